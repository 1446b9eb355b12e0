import { Deadline } from "../base/deadline.ts";
import { asError, VhostdError } from "../base/errors.ts";
import type { Json } from "../base/json.ts";
import { OperationQueue } from "../base/operation-queue.ts";
import { duplicate, type OwnedFd } from "../native/fd.ts";
import { slowClose } from "../native/slow.ts";
import { fileInfo } from "../native/sys.ts";
import type { AddressSpace, DmaRange, StoredSpace } from "./address-space.ts";
import type { BusEntry } from "./bus.ts";
import { Claims } from "./claims.ts";
import { domainRecord, readDomainRecord } from "./dma-record.ts";
import { Failures } from "./failures.ts";
import type { FunctionSnapshot, PciFunction } from "./function.ts";
import { checkFile, checkRange } from "./range-checks.ts";
import {
  describe,
  type Extent,
  extentOf,
  highestPlace,
  overlaps,
  sameBacking,
  sameRange,
  slice,
  subtract,
} from "./ranges.ts";

export interface DmaDomainOptions {
  /** Milliseconds that a claim waits for another owner to release what it overlaps; 5 s. */
  readonly conflictTimeout?: number;
  /** Milliseconds for one map, unmap, attach or detach; 30 s. */
  readonly mapTimeout?: number;
  /**
   * Writes the domain's record, what `snapshot` gives: before anything is mapped or unmapped, which is marked as under way
   * there, and after it. Where it fails nothing is mapped, or unmapped.
   */
  readonly note?: (() => Promise<void>) | undefined;
}

/** A range, and our own descriptor of its file. */
interface Mapped {
  readonly range: DmaRange;
  readonly fd: OwnedFd;
  /**
   * `mapping` and `unmapping`: it may be mapped or not, the record says so; also after an unmap that failed. `left`: an earlier
   * process died while it was that.
   */
  state: "mapping" | "mapped" | "unmapping" | "left";
}

/** What the record says to be under way. */
const PENDING = { mapping: "map", mapped: undefined, unmapping: "unmap", left: "unmap" } as const;

/** A claim that has not ended. */
interface PendingClaim {
  readonly owner: string;
  readonly range: DmaRange;
  cancelled: boolean;
  wake: () => void;
}

/**
 * One IOMMU address space and the guest memory in it: the union of what its owners claim. Owners are sessions of one
 * VM; they learn of the same memory at different moments and may cut it differently. What is mapped already is never
 * mapped again, and goes when the last claim on any part of it is released. (A mapping cannot be cut: taking away what
 * another owner still uses would fault its running queues.)
 *
 * The order that keeps memory safe: a file is held open here before it is mapped, and until its unmap has succeeded.
 * Where an unmap fails the error says so, the file stays open and the unmap is tried again with the next change.
 *
 * The order that keeps a successor safe, which the kernel does not tell what is mapped: the record knows a range, as under
 * way, before it is mapped, and until it is unmapped.
 *
 * Operations on one domain run one after the other; domains do not wait for each other.
 */
export class DmaDomain {
  private mapped: Mapped[] = [];
  private readonly claims = new Claims();
  private readonly pending = new Set<PendingClaim>();
  private readonly operations = new OperationQueue();
  private readonly conflictTimeout: number;
  private readonly mapTimeout: number;
  private readonly note: () => Promise<void>;
  /** Something was mapped or unmapped by this process. */
  private hasChanged = false;

  constructor(
    private readonly space: AddressSpace,
    options: DmaDomainOptions = {},
  ) {
    this.conflictTimeout = options.conflictTimeout ?? 5_000;
    this.mapTimeout = options.mapTimeout ?? 30_000;
    this.note = options.note ?? (async () => {});
  }

  /** Opens a function that is to be attached here. @throws VhostdError; nothing is left open then */
  open(entry: BusEntry, deadline: Deadline): Promise<PciFunction> {
    return this.space.open(entry, deadline);
  }

  /**
   * Goes on with a function as another process left it, attached, without a message to it. Takes the fds. All functions of a
   * revived domain are, before anything is asked for here.
   * @throws VhostdError invalid where the record or the fds do not fit, or the function has missed a change of the memory
   */
  reviveFunction(entry: BusEntry, data: Json, fds: Map<string, OwnedFd>): PciFunction {
    // Over vfio-user each is told for itself: it would reach what was taken away, and not what has come.
    if (this.hasChanged && this.space.snapshot === undefined) {
      for (const fd of fds.values()) fd[Symbol.dispose]();
      throw new VhostdError("invalid", `the memory of its VM has changed before ${entry.address} was taken up`);
    }
    const fn = this.space.revive(entry, data, fds);
    this.space.adopt(fn);
    return fn;
  }

  /**
   * All that is mapped becomes reachable for the function too. It is in no record yet: it dies with this process, and with it
   * what it was given so far.
   * @throws VhostdError; the function reaches nothing then
   */
  attach(fn: PciFunction): Promise<void> {
    return this.operations.run(async () => {
      await this.space.attach(fn, withFiles(this.mapped), this.deadline(`mapping guest memory for ${fn.address}`));
      if (this.space.snapshot === undefined) return;
      // The space is another one with each function. Its record is there before that of the function.
      await this.note().catch(async (error) => {
        await this.detachNow(fn);
        throw error;
      });
    });
  }

  /**
   * The function reaches nothing any more. Does not fail because it is gone. Nobody is to go on with it: its record goes
   * before.
   */
  detach(fn: PciFunction): Promise<void> {
    return this.operations.run(() => this.detachNow(fn));
  }

  /**
   * Makes guest memory reachable on behalf of `owner`; claiming the same range again changes nothing. The fd is borrowed
   * for the call.
   * @throws VhostdError invalid, where the range is misaligned or the fd is not its file; iommuDomain, where the IOMMU
   *   cannot take it or another owner holds other memory there; cancelled by a release; or what the transport says.
   *   Nothing of the claim is mapped then.
   */
  async claim(owner: string, range: DmaRange, fd: number): Promise<void> {
    checkRange(range, this.pageSize, this.usable);
    checkFile(range, fd);
    const deadline = Deadline.after(this.conflictTimeout, `waiting for guest memory at ${describe(extentOf(range))}`);
    const claim: PendingClaim = { owner, range, cancelled: false, wake: () => {} };
    this.pending.add(claim);
    try {
      for (;;) {
        const changed = new Promise<void>((resolve) => {
          claim.wake = resolve;
        });
        const conflict = await this.operations.run(() => this.tryClaim(claim, fd));
        if (conflict === undefined) return;
        await deadline.race(changed).catch((cause) => {
          throw this.conflictError(range, conflict, cause);
        });
      }
    } finally {
      this.pending.delete(claim);
    }
  }

  /**
   * Makes memory of the daemon's own reachable, where nobody has anything: as high as the IOMMU goes, because guests
   * have theirs from 0 on. The fd is borrowed for the call.
   * @param size bytes, a multiple of `pageSize`
   * @param offset where it begins in its file, bytes, the same
   * @returns where it is
   * @throws VhostdError iommuDomain where there is no room; or what `claim` does
   */
  async claimFree(owner: string, size: number, fd: number, offset = 0): Promise<DmaRange> {
    const { dev, ino } = fileInfo(fd);
    return this.operations.run(async () => {
      const taken = [...this.mapped, ...this.pending].map(({ range }) => extentOf(range));
      const iova = highestPlace(this.usable, taken, size, this.pageSize);
      if (iova === undefined) throw new VhostdError("iommuDomain", `the IOMMU has no room for ${size} bytes`);
      const range = { iova, size, file: { dev, ino }, offset };
      checkRange(range, this.pageSize, this.usable);
      checkFile(range, fd);
      await this.tryClaim({ owner, range, cancelled: false, wake: () => {} }, fd);
      return range;
    });
  }

  /** @throws VhostdError notFound, where the owner has no such claim; iommuDomain, where the memory stays mapped */
  release(owner: string, range: DmaRange): Promise<void> {
    const waiting = this.cancel((claim) => claim.owner === owner && sameRange(claim.range, range));
    return this.operations.run(async () => {
      const held = this.claims.of(owner);
      const kept = held.filter((other) => !sameRange(other, range));
      if (kept.length === held.length) {
        if (waiting) return;
        throw new VhostdError("notFound", `${owner} holds no guest memory ${describe(extentOf(range))}`);
      }
      this.claims.set(owner, kept);
      await this.unmapUnclaimed({ changed: true });
    });
  }

  /** Claims of the owner that have not ended fail: one that is being mapped before its next piece. Returns at once. */
  giveUp(owner: string): void {
    this.cancel((claim) => claim.owner === owner);
  }

  /** @throws VhostdError iommuDomain, where some of the memory stays mapped */
  releaseAll(owner: string): Promise<void> {
    this.giveUp(owner);
    return this.operations.run(async () => {
      const changed = this.claims.of(owner).length > 0;
      this.claims.set(owner, []);
      await this.unmapUnclaimed({ changed });
    });
  }

  /** Smallest unit of a mapping, bytes. */
  get pageSize(): number {
    return this.space.pageSize;
  }

  /** Which of the kernel's interfaces it uses; undefined where there is no choice. */
  get interface(): AddressSpace["interface"] {
    return this.space.interface;
  }

  /** End of the memory that `owner` holds, guest-physical, exclusive; 0 where that is none. */
  endOf(owner: string): number {
    return Math.max(0, ...this.claims.of(owner).map(({ iova, size }) => iova + size));
  }

  /** Who holds guest memory here. */
  get owners(): string[] {
    return this.claims.owners;
  }

  /** There is nothing that a successor would have to know. */
  get isEmpty(): boolean {
    return this.owners.length === 0 && this.mapped.length === 0 && this.space.snapshot?.() === undefined;
  }

  /** Plain data, the files of what is mapped or may be, and what keeps the address space (borrowed). */
  snapshot(): FunctionSnapshot {
    const mapped = this.mapped.map(({ range, fd, state }) => ({ range, fd: fd.number, pending: PENDING[state] }));
    return domainRecord(mapped, this.claims.all, this.space.snapshot?.());
  }

  /**
   * Goes on with a domain as another process left it, mapped. Takes the fds. Claims to what that process was just mapping are
   * gone: whoever asked for it asks again.
   * @param makeSpace is given what was kept of the address space, with its fds
   * @throws VhostdError invalid where the record or the fds do not fit, or what `makeSpace` throws
   */
  static revive(
    makeSpace: (stored: StoredSpace | undefined) => AddressSpace,
    data: Json,
    fds: Map<string, OwnedFd>,
    options: DmaDomainOptions = {},
  ): DmaDomain {
    const { mapped, claims, space: stored } = readDomainRecord(data, fds);
    using undo = new DisposableStack();
    for (const { fd } of mapped) undo.use(fd);
    const domain = new DmaDomain(makeSpace(stored), options);
    undo.move();
    domain.mapped = mapped.map(({ range, fd, pending }) => ({
      ...{ range, fd },
      state: pending === undefined ? "mapped" : "left",
    }));
    const left = domain.mapped.filter(({ state }) => state === "left").map(({ range }) => extentOf(range));
    for (const [owner, ranges] of claims) {
      const stand = ranges.filter((range) => !left.some((extent) => overlaps(extent, extentOf(range))));
      domain.claims.set(owner, stand);
    }
    return domain;
  }

  /**
   * Ends what was under way when the process before this one died: once, after the functions were revived and before anything
   * else is asked for. What was being mapped or unmapped is unmapped; what is mapped becomes this process's.
   * @throws VhostdError where some of it stays mapped: it is tried again with the next change
   */
  takeUp(deadline: Deadline): Promise<void> {
    return this.operations.run(async () => {
      const failures = new Failures();
      for (const one of this.mapped) if (one.state === "left") await failures.of(this.unmap(one, deadline));
      const mapped = this.mapped.filter(({ state }) => state === "mapped");
      await failures.of(this.space.takeUp?.(withFiles(mapped), deadline));
      await failures.of(this.unmapUnclaimed({ changed: true, deadline }));
      failures.check();
    });
  }

  /** No function of an earlier process is revived any more: what is held for others is let go. */
  adoptedAll(): Promise<void> {
    return this.operations.run(async () => {
      if (this.space.adoptedAll === undefined) return;
      this.space.adoptedAll();
      await this.note();
    });
  }

  /** Lets go of everything of this process without an unmap; what nobody else holds is not mapped any more. */
  abandon(): void {
    this.space[Symbol.dispose]();
    this.cancel(() => true);
    for (const { fd } of this.mapped) fd[Symbol.dispose]();
    this.mapped = [];
    this.claims.clear();
  }

  /** @returns the mapping of other memory that stands in the way */
  private async tryClaim(claim: PendingClaim, fd: number): Promise<Mapped | undefined> {
    const { owner, range } = claim;
    if (claim.cancelled)
      throw new VhostdError("cancelled", `${owner} gave up its claim to ${describe(extentOf(range))}`);
    const extent = extentOf(range);
    const there = this.mapped.filter((mapped) => overlaps(extentOf(mapped.range), extent));
    const conflict = there.find((mapped) => mapped.state !== "mapped" || !sameBacking(mapped.range, range));
    if (conflict !== undefined) {
      if (this.isClaimed(conflict.range)) return conflict;
      // Left over from an unmap that failed.
      await this.unmapUnclaimed({ only: conflict });
      return this.tryClaim(claim, fd);
    }
    const gaps = subtract(
      extent,
      there.map((mapped) => extentOf(mapped.range)),
    );
    const held = this.claims.of(owner);
    const isNew = !held.some((other) => sameRange(other, range));
    if (!isNew && gaps.length === 0) return undefined;
    // Claimed before it is mapped, so that nothing that is mapped is ever without a claim.
    if (isNew) this.claims.set(owner, [...held, range]);
    try {
      const missing = gaps.map((gap) => slice(range, gap));
      await this.map(missing, fd, () => claim.cancelled);
    } catch (error) {
      this.claims.set(owner, held);
      await this.unmapUnclaimed({ changed: true }).catch((cause) => {
        if (asError(cause).message === asError(error).message) throw error;
        throw new VhostdError("iommuDomain", `${asError(error).message}; ${asError(cause).message}`, { cause });
      });
      throw error;
    }
    return undefined;
  }

  /** Where it fails, what it has mapped is there as `unmapping`. */
  private async map(ranges: readonly DmaRange[], fd: number, cancelled: () => boolean): Promise<void> {
    const added = this.hold(ranges, fd);
    let done = 0;
    try {
      if (added.length > 0) await this.note();
      this.hasChanged ||= added.length > 0;
      for (const { range, fd: own } of added) {
        const deadline = this.deadline(`mapping guest memory ${describe(extentOf(range))}`);
        await this.space.map(range, own.number, deadline, cancelled);
        done++;
      }
      for (const one of added) one.state = "mapped";
      await this.note();
    } catch (error) {
      for (const one of added.slice(0, done)) one.state = "unmapping";
      const missing = added.slice(done);
      this.mapped = this.mapped.filter((one) => !missing.includes(one));
      for (const { fd: own } of missing) own[Symbol.dispose]();
      throw error;
    }
  }

  /** Ranges of one file that are to be mapped, with a descriptor for each. */
  private hold(ranges: readonly DmaRange[], fd: number): Mapped[] {
    using undo = new DisposableStack();
    const added = ranges.map((range): Mapped => ({ range, fd: undo.use(duplicate(fd)), state: "mapping" }));
    undo.move();
    this.mapped.push(...added);
    return added;
  }

  /**
   * Tries all of it; throws the first failure.
   * @param changed the record is not right any more, whatever is unmapped
   * @param only this one
   * @param deadline for all of it
   */
  private async unmapUnclaimed({
    changed = false,
    only,
    deadline,
  }: {
    changed?: boolean;
    only?: Mapped;
    deadline?: Deadline;
  } = {}): Promise<void> {
    const failures = new Failures();
    const unclaimed = only === undefined ? this.mapped.filter(({ range }) => !this.isClaimed(range)) : [only];
    const begun = unclaimed.filter(({ state }) => state === "mapped");
    for (const one of begun) one.state = "unmapping";
    if (begun.length > 0 && !(await failures.of(this.note()))) for (const one of begun) one.state = "mapped";
    for (const one of unclaimed) if (one.state !== "mapped") await failures.of(this.unmap(one, deadline));
    await failures.of(this.space.settle?.(deadline ?? this.deadline("unmapping guest memory")));
    if (changed || unclaimed.length > 0) await failures.of(this.note());
    for (const claim of this.pending) claim.wake();
    failures.check();
  }

  private async unmap(mapped: Mapped, deadline?: Deadline): Promise<void> {
    const { range, state } = mapped;
    const where = describe(extentOf(range));
    this.hasChanged = true;
    const until = deadline ?? this.deadline(`unmapping guest memory ${where}`);
    try {
      await (state === "left" ? this.space.unmapIfThere(range, until) : this.space.unmap(range, until));
    } catch (cause) {
      throw new VhostdError("iommuDomain", `guest memory ${where} could not be unmapped and is still reachable`, {
        fix: "remove the VFs of this VM to close their functions",
        cause,
      });
    }
    this.mapped = this.mapped.filter((other) => other !== mapped);
    await slowClose(mapped.fd);
  }

  private detachNow(fn: PciFunction): Promise<void> {
    const ranges = this.mapped.map(({ range }) => range);
    return this.space.detach(fn, ranges, this.deadline(`unmapping guest memory for ${fn.address}`));
  }

  private isClaimed(range: DmaRange): boolean {
    return this.claims.holdersOf(extentOf(range)).length > 0;
  }

  private cancel(which: (claim: PendingClaim) => boolean): boolean {
    const claims = [...this.pending].filter(which);
    for (const claim of claims) {
      claim.cancelled = true;
      claim.wake();
    }
    return claims.length > 0;
  }

  private get usable(): Extent[] {
    return this.space.ioRanges.map(({ start, end: last }) => ({ start, end: last + 1 }));
  }

  private conflictError(range: DmaRange, conflict: Mapped, cause: unknown): VhostdError {
    const extent = extentOf(conflict.range);
    const holders = this.claims.holdersOf(extent).join(", ");
    return new VhostdError(
      "iommuDomain",
      `guest memory ${describe(extentOf(range))} overlaps ${describe(extent)}, which ${holders} has from another file`,
      { fix: "check whether two VMs were given the same UUID", cause },
    );
  }

  private deadline(what: string): Deadline {
    return Deadline.after(this.mapTimeout, what);
  }
}

function withFiles(mapped: readonly Mapped[]): (DmaRange & { readonly fd: number })[] {
  return mapped.map(({ range, fd }) => ({ ...range, fd: fd.number }));
}
