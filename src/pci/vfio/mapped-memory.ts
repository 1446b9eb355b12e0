import { Deadline } from "../../base/deadline.ts";
import { asError, VhostdError } from "../../base/errors.ts";
import type { Logger } from "../../base/log.ts";
import { Mapping } from "../../native/mmio.ts";
import { fileInfo } from "../../native/sys.ts";
import type { DmaRange } from "../address-space.ts";
import { describe } from "../ranges.ts";
import type { Iommu } from "./iommu.ts";
import { Errno, failedWith } from "./iommu-uapi.ts";
import { KernelCalls } from "./kernel-calls.ts";
import { ownMemlockError } from "./memlock.ts";
import { piecesOf } from "./pieces.ts";
import { claimRoom } from "./room.ts";

const GiB = 2 ** 30;
/** Milliseconds between two lines in the log about one big mapping. */
const PROGRESS_INTERVAL = 3_000;
/** Bytes that are unmapped from this process at a time: a millisecond where pages are small. */
const UNMAP_PART = 16 << 20;

/** Bytes of an address space. */
export type Place = Pick<DmaRange, "iova" | "size">;

const CLOSE_ALL = "remove the VFs of this VM to close their functions";

/** A piece of guest memory that is mapped. */
interface Piece {
  readonly place: Place;
  /** undefined where another process has mapped it, and it was not taken up. */
  view: View | undefined;
  /** "perhaps": another process died while it mapped or unmapped it. */
  there: "certainly" | "perhaps";
}

/** It in this process, never touched there; the kernel finds the pages by it. It keeps the file. */
interface View {
  readonly address: number;
  /** Who runs out of memory ends the process that has most: not this one, for what belongs to all its guests. */
  disown(): Promise<void>;
  unmap(): Promise<void>;
}

/**
 * The guest memory in an address space of the kernel, piece by piece. A piece is in the table from when it is mapped
 * until the kernel has said that it is not.
 */
export class MappedMemory {
  private readonly pieces = new Map<number, Piece>();
  /** Those that nobody has, because the unmap failed that was to undo a map: another guest could be next to reach them. */
  private readonly stale = new Set<Piece>();
  /** Those that the kernel was told to map, and that are in no table yet: nobody may have waited for it to the end. */
  private readonly beingMapped = new Set<Place>();
  private readonly calls = new KernelCalls();

  /** @param owner whose memory it is, for the log */
  constructor(
    private readonly owner: string,
    private readonly log: Logger,
    /** Whether there is memory for what is going to be pinned. */
    private readonly room: typeof claimRoom = claimRoom,
  ) {}

  /** What no owner has, and may be mapped all the same, for whoever goes on with this. */
  get left(): Place[] {
    const places = [...[...this.stale].map(({ place }) => place), ...this.beingMapped];
    return places.map(({ iova, size }) => ({ iova, size }));
  }

  /** The first of what another process has mapped, and this one has not taken up. */
  get foreign(): Place | undefined {
    return [...this.pieces.values()].find(({ view }) => view === undefined)?.place;
  }

  /**
   * What another process has mapped, and has left so. Nothing is said to the kernel.
   * @param left what that one's `left` was
   */
  adopt(iommu: Iommu, ranges: readonly DmaRange[], left: readonly Place[]): void {
    for (const place of ranges.flatMap(piecesOf)) {
      if (this.pieces.has(place.iova)) continue;
      this.pieces.set(place.iova, { place, view: undefined, there: "certainly" });
      iommu.adoptMapping?.(place.iova);
    }
    for (const place of left) {
      if (!this.pieces.has(place.iova)) this.stale.add({ place, view: undefined, there: "perhaps" });
    }
  }

  /**
   * What was adopted is this process's from now on, as far as the kernel asks for that; and what nobody has is unmapped. All
   * is tried; what is done already is left out.
   * @throws VhostdError outOfMemory, before anything is done; iommuDomain; SystemError
   */
  async takeUp(iommu: Iommu, mapped: readonly (DmaRange & { fd: number })[], deadline: Deadline): Promise<void> {
    await deadline.race(this.calls.idle());
    if (iommu.takeUp !== undefined) await this.takeUpPieces(iommu.takeUp.bind(iommu), mapped, deadlines(deadline));
    await this.settle(iommu, deadline);
  }

  /**
   * Maps anew what was adopted and not taken up, and what an earlier call has failed to map again. Only where no function
   * reaches it.
   */
  async renew(iommu: Iommu, mapped: readonly (DmaRange & { fd: number })[], deadline: Deadline): Promise<void> {
    for (const range of mapped) {
      const views = piecesOf(range).map(({ iova }) => this.pieces.get(iova)?.view);
      if (!views.includes(undefined)) continue;
      await this.unmapIfThere(iommu, range, deadline);
      await this.map(iommu, range, range.fd, deadline);
    }
  }

  /**
   * Each piece has as much time as there is for the first: there is progress.
   * @param cancelled asked before each piece
   * @throws VhostdError cancelled and others; nothing of the range is mapped then, or the message says otherwise
   */
  async map(
    iommu: Iommu,
    range: DmaRange,
    fd: number,
    deadline: Deadline,
    cancelled: () => boolean = () => false,
  ): Promise<void> {
    await this.settle(iommu, deadline);
    using _room = await this.room(fd, range.size);
    const done: Piece[] = [];
    const next = deadlines(deadline);
    const progress = this.progress(range);
    try {
      for (const piece of piecesOf(range)) {
        if (cancelled()) throw new VhostdError("cancelled", `guest memory of ${this.owner} is not wanted any more`);
        done.push(await this.mapPiece(iommu, piece, fd, next()));
        progress(piece.size);
      }
    } catch (error) {
      const missing = range.size - done.reduce((sum, { place }) => sum + place.size, 0);
      const explained = await explain(iommu, error, missing);
      const cause = await this.unmapPieces(iommu, done, next);
      if (cause === undefined) throw explained;
      const left = this.stillMapped(done);
      for (const piece of left) this.stale.add(piece);
      const message = `${asError(explained).message}; and ${places(left)} could not be unmapped again: ${cause.message}`;
      throw new VhostdError("iommuDomain", message, { fix: CLOSE_ALL, cause });
    }
  }

  /** @throws VhostdError; what of the range is still mapped can be unmapped by trying again */
  async unmap(iommu: Iommu, range: DmaRange, deadline: Deadline): Promise<void> {
    await deadline.race(this.calls.idle());
    const pieces = piecesOf(range).map((place) => this.pieceAt(place));
    const failure = await this.unmapPieces(iommu, pieces, deadlines(deadline));
    if (failure !== undefined) throw failure;
  }

  /**
   * The same, where it is not known what of it is mapped.
   * @throws as unmap
   */
  async unmapIfThere(iommu: Iommu, range: DmaRange, deadline: Deadline): Promise<void> {
    await deadline.race(this.calls.idle());
    const pieces = piecesOf(range).map((place) => this.pieceAt(place));
    for (const piece of pieces) piece.there = "perhaps";
    const failure = await this.unmapPieces(iommu, pieces, deadlines(deadline));
    if (failure !== undefined) throw failure;
  }

  /**
   * Unmaps what is left of maps that failed; nothing is mapped before that is done.
   * @throws VhostdError iommuDomain
   */
  async settle(iommu: Iommu, deadline: Deadline): Promise<void> {
    await deadline.race(this.calls.idle());
    const cause = await this.unmapPieces(iommu, [...this.stale], deadlines(deadline));
    if (cause === undefined) return;
    const message = `guest memory ${places(this.stale)} of ${this.owner} is left of a map that failed and still reachable, and nothing more is mapped before it is unmapped: ${cause.message}`;
    throw new VhostdError("iommuDomain", message, { fix: CLOSE_ALL, cause });
  }

  /** After the last call has ended, and after `close` has taken the mappings from the functions. */
  async dispose(close: () => Promise<void>): Promise<void> {
    await this.calls.idle();
    await close();
    for (const { view } of this.pieces.values()) await view?.unmap();
    this.pieces.clear();
    this.stale.clear();
  }

  /** One that is in no table may have been unmapped by an earlier try, or mapped by another process. */
  private pieceAt(place: Place): Piece {
    return this.pieces.get(place.iova) ?? { place, view: undefined, there: "perhaps" };
  }

  private async mapPiece(iommu: Iommu, range: DmaRange, fd: number, deadline: Deadline): Promise<Piece> {
    const work = async () => {
      const view = viewOf(range, fd);
      this.beingMapped.add(range);
      try {
        await iommu.map(range.iova, range.size, view.address);
      } catch (error) {
        this.beingMapped.delete(range);
        await view.unmap();
        throw error;
      }
      const piece: Piece = { place: range, view, there: "certainly" };
      this.pieces.set(range.iova, piece);
      await view.disown();
      return piece;
    };
    const piece = await this.calls.run(deadline, work, async (late) => {
      await this.unmapNow(iommu, late).catch((error) => {
        this.stale.add(late);
        this.log.error(`guest memory of ${this.owner} ${where(range)} stays mapped`, error);
      });
      this.beingMapped.delete(range);
    });
    this.beingMapped.delete(range);
    return piece;
  }

  /** @throws the first failure */
  private async takeUpPieces(
    takeUp: NonNullable<Iommu["takeUp"]>,
    mapped: readonly (DmaRange & { fd: number })[],
    next: () => Deadline,
  ): Promise<void> {
    const all = mapped.flatMap((range) => piecesOf(range).map((place) => ({ place, fd: range.fd })));
    const foreign = all.filter(({ place }) => this.pieces.get(place.iova)?.view === undefined);
    const size = foreign.reduce((sum, { place }) => sum + place.size, 0);
    const refusal = size === 0 ? undefined : await ownMemlockError(size, undefined);
    if (refusal !== undefined) throw refusal;
    const failures: unknown[] = [];
    for (const { place, fd } of foreign) {
      const work = async () => {
        const view = viewOf(place, fd);
        try {
          await takeUp(place.iova, place.size, view.address);
        } catch (error) {
          await view.unmap();
          throw error;
        }
        this.pieces.get(place.iova)!.view = view;
      };
      await this.calls.run(next(), work, () => {}).catch((error) => failures.push(error));
    }
    if (failures.length > 0) throw failures[0];
  }

  /** Tries all of them, unless the kernel does not answer. @returns the first failure */
  private async unmapPieces(iommu: Iommu, pieces: readonly Piece[], next: () => Deadline): Promise<Error | undefined> {
    const failures: Error[] = [];
    for (const piece of pieces) {
      const last = failures.at(-1);
      if (last instanceof VhostdError && last.code === "timedOut") break;
      await this.unmapPiece(iommu, piece, next()).catch((error) => failures.push(asError(error)));
    }
    return failures[0];
  }

  /** Those that are mapped still. */
  private stillMapped(pieces: readonly Piece[]): Piece[] {
    return pieces.filter((piece) => this.pieces.get(piece.place.iova) === piece);
  }

  private async unmapPiece(iommu: Iommu, piece: Piece, deadline: Deadline): Promise<void> {
    await this.calls.run(
      deadline,
      () => this.unmapNow(iommu, piece),
      () => {},
    );
  }

  private async unmapNow(iommu: Iommu, piece: Piece): Promise<void> {
    const { place, view, there } = piece;
    const size = await iommu.unmap(place.iova, place.size);
    if (size !== place.size && (size !== 0 || there === "certainly")) {
      throw new VhostdError("iommuDomain", `the kernel unmapped ${size} of ${place.size} bytes`);
    }
    this.pieces.delete(place.iova);
    this.stale.delete(piece);
    await view?.unmap();
  }

  /** Tells of what takes long, every few seconds. */
  private progress({ size }: DmaRange): (more: number) => void {
    let done = 0;
    let told = performance.now();
    return (more) => {
      done += more;
      const now = performance.now();
      if (done === size || now - told < PROGRESS_INTERVAL) return;
      told = now;
      this.log.info(`mapping guest memory of ${this.owner}: ${Math.floor(done / GiB)} of ${Math.ceil(size / GiB)} GiB`);
    };
  }
}

/** In words. */
function places(pieces: Iterable<Piece>): string {
  return [...pieces].map(({ place }) => where(place)).join(", ");
}

export function where({ iova, size }: Place): string {
  return describe({ start: iova, end: iova + size });
}

/** @throws SystemError */
function viewOf({ offset, size }: DmaRange, fd: number): View {
  // Files of huge pages are mapped in whole pages; guest memory may be cut otherwise.
  const { pageSize } = fileInfo(fd);
  const start = Math.floor(offset / pageSize) * pageSize;
  const end = Math.ceil((offset + size) / pageSize) * pageSize;
  const mapping = Mapping.map(fd, start, end - start, "read-write");
  const { address, release } = mapping.lend(0, 1);
  const part = Math.max(UNMAP_PART, pageSize);
  return {
    address: address + (offset - start),
    disown: () => mapping.disownInParts(part),
    unmap: async () => {
      release();
      await mapping.unmapInParts(part);
    },
  };
}

/** The first is what was given; each further one has as much time as that had at first. */
function deadlines(first: Deadline): () => Deadline {
  const time = first.remaining;
  let used = false;
  return () => {
    if (used) return Deadline.after(time, first.what);
    used = true;
    return first;
  };
}

async function explain(iommu: Iommu, error: unknown, wanted: number): Promise<unknown> {
  if (failedWith(error, Errno.ENOMEM)) return (await ownMemlockError(wanted, error)) ?? error;
  if (failedWith(error, Errno.ENOSPC)) {
    const limit = iommu.mappingLimit === undefined ? "" : ` of ${iommu.mappingLimit}`;
    return new VhostdError("limitExceeded", `the kernel's limit${limit} mappings of one VM is reached`, {
      fix: "raise it: the parameter dma_entry_limit of the kernel module vfio_iommu_type1",
      cause: error,
    });
  }
  return error;
}
