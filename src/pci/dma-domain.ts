import { Deadline } from "../base/deadline.ts";
import { asError, VhostdError } from "../base/errors.ts";
import type { Json } from "../base/json.ts";
import { OperationQueue } from "../base/operation-queue.ts";
import { duplicate, type OwnedFd } from "../native/fd.ts";
import { slowClose } from "../native/slow.ts";
import { fileInfo } from "../native/sys.ts";
import type { AddressSpace, DmaRange } from "./address-space.ts";
import type { BusEntry } from "./bus.ts";
import { parseDomainRecord } from "./dma-record.ts";
import type { FunctionSnapshot, PciFunction } from "./function.ts";
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
}

/** What is mapped: a range, and our own descriptor of its file. */
interface Mapped {
  readonly range: DmaRange;
  readonly fd: OwnedFd;
}

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
 * Operations on one domain run one after the other; domains do not wait for each other.
 */
export class DmaDomain {
  private mapped: Mapped[] = [];
  private readonly claims = new Map<string, DmaRange[]>();
  private readonly pending = new Set<PendingClaim>();
  private readonly operations = new OperationQueue();
  private readonly conflictTimeout: number;
  private readonly mapTimeout: number;

  constructor(
    private readonly space: AddressSpace,
    options: DmaDomainOptions = {},
  ) {
    this.conflictTimeout = options.conflictTimeout ?? 5_000;
    this.mapTimeout = options.mapTimeout ?? 30_000;
  }

  /** Opens a function that is to be attached here. @throws VhostdError; nothing is left open then */
  open(entry: BusEntry, deadline: Deadline): Promise<PciFunction> {
    return this.space.open(entry, deadline);
  }

  /**
   * Goes on with a function as another process left it, attached, without a message to it. Takes the fds.
   * @throws VhostdError invalid where the record or the fds do not fit
   */
  reviveFunction(entry: BusEntry, data: Json, fds: Map<string, OwnedFd>): PciFunction {
    const fn = this.space.revive(entry, data, fds);
    this.space.adopt(fn);
    return fn;
  }

  /** All that is mapped becomes reachable for the function too. @throws VhostdError; the function reaches nothing then */
  attach(fn: PciFunction): Promise<void> {
    return this.operations.run(() => {
      const mapped = this.mapped.map(({ range, fd }) => ({ ...range, fd: fd.number }));
      return this.space.attach(fn, mapped, this.deadline(`mapping guest memory for ${fn.address}`));
    });
  }

  /** The function reaches nothing any more. Does not fail because it is gone. */
  detach(fn: PciFunction): Promise<void> {
    return this.operations.run(() => {
      const ranges = this.mapped.map(({ range }) => range);
      return this.space.detach(fn, ranges, this.deadline(`unmapping guest memory for ${fn.address}`));
    });
  }

  /**
   * Makes guest memory reachable on behalf of `owner`; claiming the same range again changes nothing. The fd is borrowed
   * for the call.
   * @throws VhostdError invalid, where the range is misaligned or the fd is not its file; iommuDomain, where the IOMMU
   *   cannot take it or another owner holds other memory there; cancelled by a release; or what the transport says.
   *   Nothing of the claim is mapped then.
   */
  async claim(owner: string, range: DmaRange, fd: number): Promise<void> {
    this.checkRange(range);
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
      this.checkRange(range);
      checkFile(range, fd);
      await this.tryClaim({ owner, range, cancelled: false, wake: () => {} }, fd);
      return range;
    });
  }

  /** @throws VhostdError notFound, where the owner has no such claim; iommuDomain, where the memory stays mapped */
  release(owner: string, range: DmaRange): Promise<void> {
    const waiting = this.cancel((claim) => claim.owner === owner && sameRange(claim.range, range));
    return this.operations.run(async () => {
      const held = this.claims.get(owner) ?? [];
      const kept = held.filter((other) => !sameRange(other, range));
      if (kept.length === held.length) {
        if (waiting) return;
        throw new VhostdError("notFound", `${owner} holds no guest memory ${describe(extentOf(range))}`);
      }
      this.setClaims(owner, kept);
      await this.unmapUnclaimed();
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
      this.claims.delete(owner);
      await this.unmapUnclaimed();
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
    return Math.max(0, ...(this.claims.get(owner) ?? []).map(({ iova, size }) => iova + size));
  }

  /** Who holds guest memory here. */
  get owners(): string[] {
    return [...this.claims.keys()];
  }

  /** Plain data and the files of what is mapped (borrowed). */
  snapshot(): FunctionSnapshot {
    const fds = new Map(this.mapped.map(({ fd }, i) => [`memory.${i}`, fd.number]));
    return {
      data: {
        mapped: this.mapped.map(({ range }) => plain(range)),
        claims: [...this.claims].map(([owner, ranges]) => ({ owner, ranges: ranges.map(plain) })),
      },
      fds,
    };
  }

  /**
   * Goes on with a domain as another process left it, mapped. Takes the fds.
   * @throws VhostdError invalid where the record or the fds do not fit
   */
  static revive(space: AddressSpace, data: Json, fds: Map<string, OwnedFd>, options: DmaDomainOptions = {}): DmaDomain {
    using undo = new DisposableStack();
    for (const fd of fds.values()) undo.use(fd);
    const record = parseDomainRecord(data);
    const domain = new DmaDomain(space, options);
    for (const [i, range] of record.mapped.entries()) {
      const fd = fds.get(`memory.${i}`);
      if (fd === undefined) throw new VhostdError("invalid", `the stored DMA domain lacks the descriptor memory.${i}`);
      checkFile(range, fd.number);
      domain.mapped.push({ range, fd });
    }
    if (fds.size !== record.mapped.length) {
      throw new VhostdError("invalid", `the stored DMA domain has ${fds.size} fds for ${record.mapped.length} ranges`);
    }
    for (const { owner, ranges } of record.claims) domain.claims.set(owner, [...ranges]);
    undo.move();
    return domain;
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
    const conflict = there.find((mapped) => !sameBacking(mapped.range, range));
    if (conflict !== undefined) {
      if (this.isClaimed(conflict.range)) return conflict;
      // Left over from an unmap that failed.
      await this.unmap(conflict);
      return this.tryClaim(claim, fd);
    }
    const gaps = subtract(
      extent,
      there.map((mapped) => extentOf(mapped.range)),
    );
    const held = this.claims.get(owner) ?? [];
    // Claimed before it is mapped, so that nothing that is mapped is ever without a claim.
    if (!held.some((other) => sameRange(other, range))) this.setClaims(owner, [...held, range]);
    try {
      for (const gap of gaps) await this.map(slice(range, gap), fd, () => claim.cancelled);
    } catch (error) {
      this.setClaims(owner, held);
      await this.unmapUnclaimed().catch((cause) => {
        throw new VhostdError("iommuDomain", `${asError(error).message}; ${asError(cause).message}`, { cause });
      });
      throw error;
    }
    return undefined;
  }

  private async map(range: DmaRange, fd: number, cancelled: () => boolean): Promise<void> {
    using undo = new DisposableStack();
    const own = undo.use(duplicate(fd));
    const deadline = this.deadline(`mapping guest memory ${describe(extentOf(range))}`);
    await this.space.map(range, own.number, deadline, cancelled);
    undo.move();
    this.mapped.push({ range, fd: own });
  }

  private async unmap(mapped: Mapped): Promise<void> {
    const where = describe(extentOf(mapped.range));
    try {
      await this.space.unmap(mapped.range, this.deadline(`unmapping guest memory ${where}`));
    } catch (cause) {
      throw new VhostdError("iommuDomain", `guest memory ${where} could not be unmapped and is still reachable`, {
        fix: "remove the VFs of this VM to close their functions",
        cause,
      });
    }
    this.mapped = this.mapped.filter((other) => other !== mapped);
    await slowClose(mapped.fd);
  }

  /** Tries all of it; throws the first failure. */
  private async unmapUnclaimed(): Promise<void> {
    const failures: unknown[] = [];
    for (const mapped of this.mapped.filter(({ range }) => !this.isClaimed(range))) {
      await this.unmap(mapped).catch((error) => failures.push(error));
    }
    const settled = this.space.settle?.(this.deadline("unmapping guest memory"));
    await settled?.catch((error) => failures.push(error));
    for (const claim of this.pending) claim.wake();
    if (failures.length > 0) throw failures[0];
  }

  private isClaimed(range: DmaRange): boolean {
    const extent = extentOf(range);
    return [...this.claims.values()].some((ranges) => ranges.some((claimed) => overlaps(extentOf(claimed), extent)));
  }

  private setClaims(owner: string, ranges: DmaRange[]): void {
    if (ranges.length === 0) this.claims.delete(owner);
    else this.claims.set(owner, ranges);
  }

  private cancel(which: (claim: PendingClaim) => boolean): boolean {
    const claims = [...this.pending].filter(which);
    for (const claim of claims) {
      claim.cancelled = true;
      claim.wake();
    }
    return claims.length > 0;
  }

  private checkRange(range: DmaRange): void {
    const { iova, size, offset } = range;
    const end = iova + size;
    const whole = [iova, size, offset, end, offset + size].every((value) => Number.isSafeInteger(value) && value >= 0);
    if (!whole || size === 0) {
      throw new VhostdError("invalid", `guest memory of ${size} bytes at ${iova}, offset ${offset}: not a range`);
    }
    const where = describe(extentOf(range));
    const page = this.space.pageSize;
    if ([iova, size, offset].some((value) => value % page !== 0)) {
      throw new VhostdError(
        "invalid",
        `guest memory ${where} at offset 0x${offset.toString(16)} of its file cannot be mapped: its begin, length and offset must be multiples of ${page} bytes`,
      );
    }
    const { usable } = this;
    const [hole] = subtract(extentOf(range), usable);
    if (hole !== undefined) {
      throw new VhostdError(
        "iommuDomain",
        `guest memory ${where} meets ${describe(hole)}, which the IOMMU cannot map`,
        {
          fix: "give the guest less memory, or move its memory around the hole",
          data: { start: hole.start, end: hole.end - 1 },
        },
      );
    }
    // A union of two usable ranges is not one: a mapping that crosses their border may be refused in its middle.
    if (!usable.some((one) => one.start <= iova && end <= one.end)) {
      throw new VhostdError("iommuDomain", `guest memory ${where} crosses the border of two ranges of the IOMMU`);
    }
  }

  private get usable(): Extent[] {
    return this.space.ioRanges.map(({ start, end: last }) => ({ start, end: last + 1 }));
  }

  private conflictError(range: DmaRange, conflict: Mapped, cause: unknown): VhostdError {
    const extent = extentOf(conflict.range);
    const owners = [...this.claims].filter(([, held]) => held.some((other) => overlaps(extentOf(other), extent)));
    return new VhostdError(
      "iommuDomain",
      `guest memory ${describe(extentOf(range))} overlaps ${describe(extent)}, which ${owners.map(([owner]) => owner).join(", ")} has from another file`,
      { fix: "check whether two VMs were given the same UUID", cause },
    );
  }

  private deadline(what: string): Deadline {
    return Deadline.after(this.mapTimeout, what);
  }
}

/**
 * A file may end inside its last page: memory is mapped, and kept, by whole pages.
 * @throws VhostdError invalid where the fd is another file than the range says, or the range ends beyond its last page
 */
function checkFile(range: DmaRange, fd: number): void {
  const { dev, ino, size, pageSize } = fileInfo(fd);
  const where = describe(extentOf(range));
  if (dev !== range.file.dev || ino !== range.file.ino) {
    throw new VhostdError("invalid", `guest memory ${where} came with another file than the one it names`);
  }
  if (range.offset + range.size > Math.ceil(size / pageSize) * pageSize) {
    throw new VhostdError("invalid", `guest memory ${where} ends at ${range.offset + range.size} of a file of ${size}`);
  }
}

function plain({ iova, size, file, offset }: DmaRange) {
  return { iova, size, file: { dev: file.dev, ino: file.ino }, offset };
}
