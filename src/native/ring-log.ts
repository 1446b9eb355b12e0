import type { Deadline } from "../base/deadline.ts";
import { VhostdError } from "../base/errors.ts";
import { checkInteger, checkSize } from "./arguments.ts";
import { type MapForm, mapBytes } from "./dirty-log.ts";

/** Memory whose pages are marked, as the function addresses it. Bytes; all are multiples of the page size. */
export interface LogRange {
  readonly address: number;
  readonly length: number;
  /** A power of two. */
  readonly pageSize: number;
}

/** A part of a map, as the function whose memory it lies in addresses it. Bytes. */
export interface LogPlace {
  readonly address: number;
  readonly length: number;
}

/** The part of native/ring/ring-napi.cc that is about marking pages. */
export interface NativeRingLog {
  /** @param lender with `places`: another NativeRingLog */
  startLog(map: MapForm, address: number, length: number, pageSize: number): string;
  startLog(
    map: MapForm,
    address: number,
    length: number,
    pageSize: number,
    places: readonly LogPlace[],
    lender: NativeRingLog,
  ): string;
  stopLog(): void;
  cutLog(reason: string): void;
  logLoss(): string;
  takeLog(offset: number, length: number): Uint8Array;
}

/** Of the engine that it is part of. */
export interface RingLogHost {
  readonly closed: boolean;
  /** @throws VhostdError cancelled where it is closed */
  native(): NativeRingLog;
  /** Runs `operation` while the worker is between two pieces of work. @throws VhostdError timedOut */
  turn(operation: () => void, deadline: Deadline): Promise<void>;
}

/** Bytes of a map of that memory. */
export function mapSize(form: MapForm, { length, pageSize }: LogRange): number {
  return mapBytes(form, length / pageSize);
}

/**
 * Where a function marks each page that it writes, its used rings too: after the data and before the used index that
 * announces it. It goes on through resets, and whether the function runs or not.
 */
export class RingLog {
  private readable = 0;

  constructor(private readonly host: RingLogHost) {}

  /**
   * What is written after this has resolved is marked. A map of its own is clear then.
   * @param lent where the map lies, in memory of another engine, from the first place to the last, at least as large as
   * `mapSize`; without it the map is read by `take`. When that memory is unmapped nothing is marked any more
   * @param wanted asked at the last moment
   * @throws VhostdError invalid where that is not mapped and writable; timedOut; cancelled where it is not wanted
   */
  async start(
    map: MapForm,
    range: LogRange,
    lent: { readonly places: readonly LogPlace[]; readonly from: RingLog } | undefined,
    wanted: () => boolean,
    deadline: Deadline,
  ): Promise<void> {
    const { address, length, pageSize } = checkRange(range);
    for (const place of lent?.places ?? []) {
      checkSize(place.address, "address of a dirty map");
      checkSize(place.length, "size of a dirty map");
    }
    await this.host.turn(() => {
      if (!wanted()) throw new VhostdError("cancelled", "nobody wants pages to be marked any more");
      const native = this.host.native();
      const reason =
        lent === undefined
          ? native.startLog(map, address, length, pageSize)
          : native.startLog(map, address, length, pageSize, lent.places, lent.from.host.native());
      if (reason !== "") throw new VhostdError("invalid", reason);
      this.readable = lent === undefined ? mapSize(map, range) : 0;
    }, deadline);
  }

  /** What was written before is marked when it resolves; what comes is not. @throws VhostdError timedOut */
  async stop(deadline: Deadline): Promise<void> {
    await this.host.turn(() => {
      this.host.native().stopLog();
      this.readable = 0;
    }, deadline);
  }

  /** Nothing is marked any more when it returns; the memory is not touched. Never waits. */
  cut(reason: string): void {
    if (!this.host.closed) this.host.native().cutLog(reason);
  }

  /** Why not all is marked any more; undefined where all is. */
  get loss(): string | undefined {
    return this.host.native().logLoss() || undefined;
  }

  /** Reads and clears a part of a map of its own. Bytes. */
  take(offset: number, length: number): Uint8Array {
    checkInteger(offset, 0, this.readable, "offset in a dirty map");
    checkInteger(length, 0, this.readable - offset, "length of a part of a dirty map");
    return this.host.native().takeLog(offset, length);
  }
}

function checkRange(range: LogRange): LogRange {
  const { address, length, pageSize } = range;
  checkSize(address + length, "end of a tracked range");
  checkInteger(Math.log2(checkSize(pageSize, "page size")), 12, 31, "log2 of the page size");
  if (length === 0 || address % pageSize !== 0 || length % pageSize !== 0) {
    throw new VhostdError("invalid", `tracked range ${address}+${length} is not made of pages of ${pageSize}`);
  }
  return range;
}
