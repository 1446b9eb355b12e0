import { VhostdError } from "../base/errors.ts";
import type { OwnedFd } from "../native/fd.ts";

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

/** A record, which means nothing here, and its fds in the order in which they came. */
export interface StoredRecord {
  readonly bytes: Uint8Array;
  readonly fds: readonly OwnedFd[];
}

/** The records of a daemon, with the fds that they speak of. */
export class Store implements Disposable {
  private readonly records = new Map<string, StoredRecord>();
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

  /**
   * In the place of an earlier record of that key. Takes the fds where it does not throw.
   * @throws VhostdError keeperStore beyond a limit; what was there stays
   */
  put(key: string, record: StoredRecord): void {
    const before = this.records.get(key);
    const size = this.size - (before?.bytes.length ?? 0) + record.bytes.length;
    const fdCount = this.fdCount - (before?.fds.length ?? 0) + record.fds.length;
    const { limits } = this;
    this.checkRecord(key, record.bytes.length, record.fds.length);
    check(`bytes of all records with ${key}`, size, limits.totalSize);
    check(`fds of all records with ${key}`, fdCount, limits.totalFds);
    check("records", this.records.size + (before === undefined ? 1 : 0), limits.records);
    this.records.set(key, record);
    this.size = size;
    this.fdCount = fdCount;
    closeAll(before?.fds ?? []);
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

function closeAll(fds: readonly OwnedFd[]): void {
  for (const fd of fds) fd[Symbol.dispose]();
}
