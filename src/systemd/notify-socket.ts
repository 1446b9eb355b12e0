import type { Deadline } from "../base/deadline.ts";
import { OperationQueue } from "../base/operation-queue.ts";
import { connectDatagram, sendDatagram } from "../native/datagram.ts";
import type { OwnedFd } from "../native/fd.ts";
import { watch } from "../native/poller.ts";
import { socketPair } from "../native/sys.ts";

const encoder = new TextEncoder();

/** The way to the service manager: messages that it does not answer (sd_notify(3)). It handles them in their order. */
export class NotifySocket implements Disposable {
  private readonly socket: OwnedFd;
  private readonly sending = new OperationQueue();

  /** @param address $NOTIFY_SOCKET. @throws SystemError */
  constructor(address: string) {
    this.socket = connectDatagram(address);
  }

  /**
   * After the messages before it, when there is room for it.
   * @param fields "READY=1", ...
   * @param fds borrowed until it resolves
   * @throws SystemError; VhostdError timedOut, and nothing was sent
   */
  async send(fields: readonly string[], fds: readonly number[], deadline: Deadline): Promise<void> {
    const message = encoder.encode(fields.join("\n"));
    await this.sending.run(async () => {
      deadline.check();
      while (!sendDatagram(this.socket.number, message, fds)) {
        await becomes(this.socket.number, "out", deadline);
      }
    });
  }

  /**
   * Asks the service manager to close an fd when it comes to it.
   * @returns resolves when all messages before it were handled; its failure is VhostdError timedOut
   * @throws as send() does
   */
  async sendBarrier(deadline: Deadline): Promise<{ readonly passed: Promise<void> }> {
    using undo = new DisposableStack();
    const [own, lent] = socketPair();
    undo.use(own);
    using _lent = lent;
    await this.send(["BARRIER=1"], [lent.number], deadline);
    undo.move();
    return { passed: hangUp(own, deadline) };
  }

  [Symbol.dispose](): void {
    this.socket[Symbol.dispose]();
  }
}

/** Takes the fd. */
async function hangUp(fd: OwnedFd, deadline: Deadline): Promise<void> {
  using own = fd;
  await becomes(own.number, "in", deadline);
}

async function becomes(fd: number, direction: "in" | "out", deadline: Deadline): Promise<void> {
  const { promise, resolve } = Promise.withResolvers<void>();
  using _watch = watch(fd, direction, resolve);
  await deadline.race(promise);
}
