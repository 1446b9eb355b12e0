import { VhostdError } from "../base/errors.ts";
import { CloseLane, type OwnedFd } from "../native/fd.ts";
import { NEW_FD } from "./messages.ts";

/** What a keeper keeps at most, in all and of one record. */
export interface StoreLimits {
  readonly records: number;
  /** Bytes. */
  readonly recordSize: number;
  readonly totalSize: number;
  readonly recordFds: number;
  readonly totalFds: number;
}

/** A VF with 256 queues has some 800 fds; a machine has some thousand VFs. */
export const STORE_LIMITS: StoreLimits = {
  records: 16_384,
  recordSize: 1 << 20,
  totalSize: 256 << 20,
  recordFds: 4096,
  totalFds: 262_144,
};

/** Lanes of keys without records that may be there before those are looked for. */
const LANES_SPARE = 64;

/** A record, which means nothing here, and its fds in the order in which they came. */
export interface StoredRecord {
  readonly bytes: Uint8Array;
  readonly fds: readonly OwnedFd[];
}

/** The records of a daemon, with the fds that they speak of. */
export class Store implements Disposable {
  private readonly records = new Map<string, StoredRecord>();
  /** By key: what a VM has sent holds up the closing of its own files only, also when others come in their place. */
  private readonly lanes = new Map<string, CloseLane>();
  /** With so many lanes those that are not needed any more are dropped. */
  private mostLanes = LANES_SPARE;
  private size = 0;
  private fdCount = 0;

  constructor(private readonly limits: StoreLimits = STORE_LIMITS) {}

  get keys(): readonly string[] {
    return [...this.records.keys()];
  }

  /** How much there is, for people. */
  get totals(): { readonly records: number; readonly bytes: number; readonly fds: number } {
    return { records: this.records.size, bytes: this.size, fds: this.fdCount };
  }

  /** Borrowed. */
  get(key: string): StoredRecord | undefined {
    return this.records.get(key);
  }

  /** Where the fds of this key's records are closed. */
  laneOf(key: string): CloseLane {
    const known = this.lanes.get(key);
    if (known !== undefined) return known;
    if (this.lanes.size >= this.mostLanes) {
      for (const [of, lane] of this.lanes) if (!this.records.has(of) && lane.idle) this.lanes.delete(of);
      this.mostLanes = 2 * this.lanes.size + LANES_SPARE;
    }
    const lane = new CloseLane();
    this.lanes.set(key, lane);
    return lane;
  }

  /** As put, of a record whose bytes stay. @throws VhostdError as `put`; notFound */
  putFds(key: string, places: Iterable<number>, fds: readonly OwnedFd[]): Disposable {
    const { bytes } = this.records.get(key) ?? {};
    if (bytes === undefined) throw new VhostdError("notFound", `there is no record ${key}`);
    return this.put(key, places, { bytes, fds });
  }

  /**
   * In the place of an earlier record of that key, of which some fds may stay. Takes the fds, which are in its lane, where it
   * does not throw.
   * @param places of each fd in the earlier record, or NEW_FD: those are `record.fds`, in their order
   * @returns what stays of the earlier one, whose fds are closed when it is disposed of
   * @throws VhostdError protocol; keeperStore beyond a limit, or while too many fds of that key are still being closed; what was
   *   there stays
   */
  put(key: string, places: Iterable<number>, { bytes, fds: added }: StoredRecord): Disposable {
    const unused: (OwnedFd | undefined)[] = [...(this.records.get(key)?.fds ?? [])];
    let taken = 0;
    const fds = Array.from(places, (place) => {
      const fd = place === NEW_FD ? added[taken++] : unused[place];
      if (fd === undefined) throw new VhostdError("protocol", `the record ${key} has no fd ${place} that could stay`);
      if (place !== NEW_FD) unused[place] = undefined;
      return fd;
    });
    if (taken < added.length) throw new VhostdError("protocol", `the record ${key} came with too many fds`);
    this.replace(key, { bytes, fds });
    return { [Symbol.dispose]: () => closeAll(unused) };
  }

  private replace(key: string, record: StoredRecord): void {
    const before = this.records.get(key);
    const size = this.size - (before?.bytes.length ?? 0) + record.bytes.length;
    const fdCount = this.fdCount - (before?.fds.length ?? 0) + record.fds.length;
    const { limits } = this;
    if (this.laneOf(key).full) {
      throw new VhostdError("keeperStore", `too many files of earlier records ${key} are still being closed`);
    }
    this.checkRecord(key, record.bytes.length, record.fds.length);
    check(`bytes of all records with ${key}`, size, limits.totalSize);
    check(`fds of all records with ${key}`, fdCount, limits.totalFds);
    check("records", this.records.size + (before === undefined ? 1 : 0), limits.records);
    this.records.set(key, record);
    this.size = size;
    this.fdCount = fdCount;
  }

  /** A record, or the begin of one, that may grow into one that is kept. @throws VhostdError keeperStore */
  checkRecord(key: string, size: number, fds: number): void {
    check(`bytes of the record ${key}`, size, this.limits.recordSize);
    check(`fds of the record ${key}`, fds, this.limits.recordFds);
  }

  /** Nothing where there is none. */
  delete(key: string): void {
    const record = this.records.get(key);
    if (record === undefined) return;
    this.records.delete(key);
    this.size -= record.bytes.length;
    this.fdCount -= record.fds.length;
    closeAll(record.fds);
  }

  [Symbol.dispose](): void {
    for (const key of this.keys) this.delete(key);
  }
}

function check(what: string, seen: number, most: number): void {
  if (seen > most) throw new VhostdError("keeperStore", `${what}: ${seen}, at most ${most}`);
}

function closeAll(fds: readonly (OwnedFd | undefined)[]): void {
  for (const fd of fds) fd?.[Symbol.dispose]();
}
