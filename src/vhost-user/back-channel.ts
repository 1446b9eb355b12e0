import { asError, sentence } from "../base/errors.ts";
import type { OwnedFd } from "../native/fd.ts";
import { sendAtOnce } from "../native/message-socket.ts";
import type { BoundedLog } from "./bounded-log.ts";
import { BackendRequest, encodeMessage, PROTOCOL_VERSION, VRING_AREA } from "./messages.ts";
import type { DoorbellShare, SessionTarget } from "./target.ts";

/** Milliseconds between two attempts to tell of a change that the socket has had no room for. */
const RETRY_INTERVAL = 250;

/**
 * The channel on which the back-end tells the front-end something (SET_BACKEND_REQ_FD). No reply is asked for, so that
 * nothing is ever read: the front-end may have kept a duplicate of this end, and who reads from one waits, and cannot be
 * killed, for whoever else does. Nothing is waited for either: what is sent has room in the socket's buffer.
 */
export class BackChannel implements Disposable {
  private retry: ReturnType<typeof setTimeout> | undefined;
  private readonly saidFull = new Set<string>();

  /** Takes ownership of a unix stream socket. */
  constructor(
    private readonly owned: OwnedFd,
    private readonly log: BoundedLog,
  ) {}

  /** Borrowed. */
  get fd(): number {
    return this.owned.number;
  }

  /** The channel that takes its place; a change that waits is told there. Takes ownership of `fd`; this one is closed. */
  succeededBy(fd: OwnedFd): BackChannel {
    const next = new BackChannel(fd, this.log);
    if (this.retry !== undefined) next.configChanged();
    this[Symbol.dispose]();
    return next;
  }

  /** CONFIG_CHANGE_MSG. Changes that come while one waits for room in the socket are told with it. */
  configChanged(): void {
    if (this.owned.closed || this.retry !== undefined) return;
    if (this.tell(BackendRequest.CONFIG_CHANGE_MSG, new Uint8Array())) return;
    this.sayFull("changes of the configuration are told when it does");
    // By the clock: that there is room could be said again and again by whoever shares the socket, and not be so.
    this.retry = setTimeout(() => {
      this.retry = undefined;
      this.configChanged();
    }, RETRY_INTERVAL);
    this.retry.unref();
  }

  /** Offers the doorbells of these queues, where the function can share them. */
  async shareDoorbells(target: Pick<SessionTarget, "doorbellShare">, queues: readonly number[]): Promise<void> {
    for (const queue of queues) {
      const share = await target.doorbellShare?.(queue);
      if (share !== undefined && !this.owned.closed) this.hostNotifier(queue, share);
    }
  }

  /**
   * VRING_HOST_NOTIFIER_MSG: the front-end may map the queue's doorbell itself. One that does not has been given the function
   * all the same: its kicks go a way on which nobody can be kept waiting, and which is slower. So do those of one that the
   * socket has no room for.
   */
  private hostNotifier(queue: number, { fd, offset, size }: DoorbellShare): void {
    const area = VRING_AREA.encode({ queue: BigInt(queue), size, offset });
    if (!this.tell(BackendRequest.VRING_HOST_NOTIFIER_MSG, area, [fd])) this.sayFull("doorbells are not given to it");
  }

  /** Closes the fd. The stream does not end where a successor of this process holds a duplicate. */
  [Symbol.dispose](): void {
    clearTimeout(this.retry);
    this.owned[Symbol.dispose]();
  }

  /**
   * A message of this size is sent whole or not at all.
   * @returns false where the socket has no room for it; a front-end that hung up, or cannot be told, need not be told
   */
  private tell(request: number, payload: Uint8Array, fds: readonly number[] = []): boolean {
    try {
      if (sendAtOnce(this.fd, encodeMessage(request, PROTOCOL_VERSION, payload), fds) > 0) return true;
    } catch (error) {
      this.log.warn(`the front-end could not be told: ${sentence(asError(error))}`);
      return true;
    }
    return false;
  }

  /** Once for each consequence. */
  private sayFull(consequence: string): void {
    if (this.saidFull.has(consequence)) return;
    this.saidFull.add(consequence);
    this.log.warn(`the front-end does not read the back-end's channel: ${consequence}`);
  }
}
