import { Deadline } from "../base/deadline.ts";
import { asError, VhostdError } from "../base/errors.ts";
import type { Logger } from "../base/log.ts";
import { OperationQueue } from "../base/operation-queue.ts";
import type { OwnedFd } from "../native/fd.ts";
import { Connection } from "./connection.ts";
import { BackendRequest, U64, VRING_AREA } from "./messages.ts";
import type { DoorbellShare, SessionTarget } from "./target.ts";

/** A front-end that has not answered by then is not waited for any longer. Milliseconds. */
const REPLY_TIMEOUT = 10_000;

/**
 * The channel on which the back-end asks and the front-end answers (SET_BACKEND_REQ_FD). It has an order of its own:
 * a front-end reads the configuration on the main connection before it answers here.
 */
export class BackChannel implements Disposable {
  private readonly connection: Connection;
  private readonly requests = new OperationQueue();
  private answered: ((value: bigint) => void) | undefined;
  private changeWaits = false;
  private pagesRefused = false;
  private open = true;

  /** @param replyAck a reply was negotiated (REPLY_ACK) and is asked for */
  constructor(
    fd: OwnedFd,
    private readonly replyAck: boolean,
    private readonly log: Logger,
  ) {
    this.connection = new Connection(fd, { payloadLimit: () => U64.size });
    void this.readReplies();
  }

  get fd(): number {
    return this.connection.fd;
  }

  /** CONFIG_CHANGE_MSG. Changes that come while one waits to be told are told with it. */
  configChanged(): void {
    if (this.changeWaits) return;
    this.changeWaits = true;
    this.enqueue(() => {
      this.changeWaits = false;
      return this.ask(BackendRequest.CONFIG_CHANGE_MSG, new Uint8Array());
    });
  }

  /** Offers the doorbells of these queues, where the function can share them. */
  async shareDoorbells(target: Pick<SessionTarget, "doorbellShare">, queues: readonly number[]): Promise<void> {
    for (const queue of queues) {
      const share = await target.doorbellShare?.(queue);
      if (share !== undefined) this.hostNotifier(queue, share);
    }
  }

  /**
   * VRING_HOST_NOTIFIER_MSG: the front-end may map the queue's doorbell itself. One that does not has been given the function
   * all the same: its kicks go a way on which nobody can be kept waiting, and which is slower.
   */
  private hostNotifier(queue: number, { fd, offset, size }: DoorbellShare): void {
    const area = VRING_AREA.encode({ queue: BigInt(queue), size, offset });
    this.enqueue(async () => {
      try {
        await this.ask(BackendRequest.VRING_HOST_NOTIFIER_MSG, area, [fd]);
      } catch (error) {
        if (!(error instanceof VhostdError && error.code === "notSupported")) throw error;
        if (!this.pagesRefused) this.log.warn("the front-end maps no doorbells", slowKicks(error));
        this.pagesRefused = true;
      }
    });
  }

  /** Closes the fd. The stream does not end where a successor of this process holds a duplicate. */
  [Symbol.dispose](): void {
    this.open = false;
    this.answered?.(0n);
    if (!this.connection.closed) this.connection.abandon()[Symbol.dispose]();
  }

  private enqueue(operation: () => Promise<void>): void {
    this.requests
      .run(async () => {
        if (this.open) await operation();
      })
      .catch((error: unknown) => {
        if (this.open) this.log.warn("the front-end could not be told", asError(error));
      });
  }

  private async ask(request: number, payload: Uint8Array, fds: readonly number[] = []): Promise<void> {
    const reply = Promise.withResolvers<bigint>();
    if (this.replyAck) this.answered = reply.resolve;
    await this.connection.request(request, payload, this.replyAck, fds);
    if (!this.replyAck) return;
    const value = await Deadline.after(REPLY_TIMEOUT, `reply to back-end request ${request}`).race(reply.promise);
    if (value !== 0n) throw new VhostdError("notSupported", `back-end request ${request} was refused with ${value}`);
  }

  /** A reply that nobody waits for (its request was an earlier process's) is dropped. */
  private async readReplies(): Promise<void> {
    try {
      for (;;) {
        using message = await this.connection.receive();
        if (message === undefined) break;
        if (message.payload.byteLength === U64.size) this.answered?.(U64.read(message.payload).value);
        this.answered = undefined;
      }
    } catch (error) {
      if (this.open) this.log.debug(`back-end channel: ${asError(error).message}`);
    }
    this.open = false;
    this.answered?.(0n);
  }
}

function slowKicks(cause: VhostdError): VhostdError {
  return new VhostdError("notSupported", "its kicks take the slow way, through this daemon", {
    fix: "start the VMM's device with page-per-vq=on, or add the VF with --no-host-notifier",
    cause,
  });
}
