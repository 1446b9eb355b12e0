import { asError } from "../base/errors.ts";
import type { OwnedFd } from "../native/fd.ts";
import type { StoredRecord } from "./store.ts";

/** A record that comes in parts. One that is refused holds nothing, and says so when it is whole. */
export class IncomingRecord implements Disposable {
  private parts: Uint8Array[] = [];
  private fds: OwnedFd[] = [];
  private size = 0;
  private refusal: Error | undefined;

  /** @param check throws where a record of that size, bytes, and with so many fds is refused */
  constructor(
    readonly key: string,
    private readonly check: (size: number, fds: number) => void,
  ) {}

  /** Takes the fds. */
  add(payload: Uint8Array, fds: readonly OwnedFd[]): void {
    this.fds.push(...fds);
    this.parts.push(payload);
    this.size += payload.length;
    try {
      this.check(this.size, this.fds.length);
    } catch (error) {
      this.refusal ??= asError(error);
    }
    if (this.refusal !== undefined) this[Symbol.dispose]();
  }

  /** All parts together; the fds are the caller's. @throws what `check` did */
  take(): StoredRecord {
    if (this.refusal !== undefined) throw this.refusal;
    const record = { bytes: Buffer.concat(this.parts), fds: this.fds };
    this.fds = [];
    return record;
  }

  [Symbol.dispose](): void {
    for (const fd of this.fds.splice(0)) fd[Symbol.dispose]();
    this.parts = [];
  }
}
