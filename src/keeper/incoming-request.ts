import { asError, VhostdError } from "../base/errors.ts";
import type { CloseLane, OwnedFd } from "../native/fd.ts";
import { HeaderFlag, isFull, type KeeperMessage } from "./messages.ts";
import type { StoredRecord } from "./store.ts";

/** A request that comes in parts. One that is refused holds nothing, and says so when it is whole. */
export class IncomingRequest implements Disposable {
  private parts: Uint8Array[] = [];
  private fds: OwnedFd[] = [];
  private size = 0;
  private refusal: Error | undefined;

  /**
   * @param lane where the fds are closed
   * @param check throws where a request of that size, bytes, and with so many fds is refused
   */
  constructor(
    private readonly first: KeeperMessage,
    private readonly lane: CloseLane,
    private readonly check: (size: number, fds: number) => void,
  ) {}

  /**
   * Takes the fds.
   * @returns whether it is whole
   * @throws VhostdError protocol where it is none of its parts
   */
  add({ id, command, key, flags, payload }: KeeperMessage, fds: OwnedFd[]): boolean {
    const { first } = this;
    if (id !== first.id || command !== first.command || key !== first.key) {
      throw new VhostdError(
        "protocol",
        `command ${command} of ${key} came in the middle of command ${first.command} of ${first.key}`,
      );
    }
    const more = (flags & HeaderFlag.more) !== 0;
    if (more && !isFull(payload, fds.length))
      throw new VhostdError("protocol", "a part that is not full is not the last one");
    this.size += payload.length;
    this.parts.push(payload);
    this.fds.push(...fds.splice(0).map((fd) => fd.inLane(this.lane)));
    try {
      this.check(this.size, this.fds.length);
    } catch (error) {
      this.refusal ??= asError(error);
    }
    if (this.refusal !== undefined) this[Symbol.dispose]();
    return !more;
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
