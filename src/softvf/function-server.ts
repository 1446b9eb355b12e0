import { Deadline } from "../base/deadline.ts";
import { asError } from "../base/errors.ts";
import type { Logger } from "../base/log.ts";
import type { OwnedFd } from "../native/fd.ts";
import { type Watch, watch } from "../native/poller.ts";
import { accept, listenUnix, shutDown } from "../native/sys.ts";
import { ClientConnection, turnAway } from "./client-connection.ts";
import type { SoftFunction } from "./soft-function.ts";

/** Owner only: who can connect can have the function read and write any memory it gives. */
const SOCKET_MODE = 0o600;
/** Milliseconds that a client waits for one that is just going, before it is turned away. */
const HANDOVER = 500;
/** Clients that may wait to be served or turned away; the connection of any other is closed unanswered. */
const GREETINGS_MAX = 8;
/** Clients accepted before other work of the event loop has its turn. */
const ARRIVALS_A_TURN = 16;
/** Milliseconds until clients are accepted again after that failed: nothing tells when a descriptor is free. */
const ACCEPT_PAUSE = 500;
/** Milliseconds for clients and worker to end when the server is closed; a worker may hang in the disk for ever. */
const CLOSE_TIMEOUT = 2000;

/** Serves one function on one unix socket, to one client at a time. */
export class FunctionServer {
  private readonly listener: OwnedFd;
  private readonly arrivals: Watch;
  private current: { readonly connection: ClientConnection; readonly ended: Promise<void> } | undefined;
  private readonly greetings = new Set<Promise<void>>();
  private pause: ReturnType<typeof setTimeout> | undefined;
  private closing = false;

  /** @throws SystemError EADDRINUSE where somebody listens there */
  constructor(
    readonly path: string,
    private readonly fn: SoftFunction,
    private readonly log: Logger,
  ) {
    this.listener = listenUnix(path, SOCKET_MODE);
    this.arrivals = watch(this.listener.number, "in", () => this.onArrival());
  }

  /** A client has the function, or its worker has not ended yet. */
  get busy(): boolean {
    return this.current !== undefined;
  }

  /**
   * Hangs up on the client and waits until the function is as new, or two seconds where its worker hangs in the disk.
   * The socket file stays.
   */
  async close(): Promise<void> {
    this.closing = true;
    clearTimeout(this.pause);
    this.arrivals[Symbol.dispose]();
    // At once, although the close itself happens elsewhere: whoever listens here next must find nobody.
    shutDown(this.listener.number);
    this.listener[Symbol.dispose]();
    this.current?.connection.close();
    const ended = Promise.all([this.current?.ended, ...this.greetings]);
    try {
      await Deadline.after(CLOSE_TIMEOUT, "the end of the clients").race(ended);
    } catch (error) {
      this.log.warn("left behind", asError(error));
    }
  }

  private onArrival(): void {
    try {
      for (let count = 0; count < ARRIVALS_A_TURN; count++) {
        const fd = accept(this.listener.number, this.listener.lane);
        if (fd === undefined) break;
        this.admit(fd);
      }
      this.arrivals.rearm();
    } catch (error) {
      this.log.warn(`no client is accepted for ${ACCEPT_PAUSE} ms`, asError(error));
      // Those that wait stay in the socket's queue.
      this.pause = setTimeout(() => this.onArrival(), ACCEPT_PAUSE);
    }
  }

  private admit(fd: OwnedFd): void {
    if (this.greetings.size >= GREETINGS_MAX) {
      this.log.debug(`a client is hung up on: ${GREETINGS_MAX} wait already`);
      fd[Symbol.dispose]();
      return;
    }
    const greeting = this.greet(fd).catch((error) => this.log.warn("client turned away", asError(error)));
    this.greetings.add(greeting);
    void greeting.then(() => this.greetings.delete(greeting));
  }

  private async greet(fd: OwnedFd): Promise<void> {
    if (this.current !== undefined) await Promise.race([this.current.ended, Bun.sleep(HANDOVER)]);
    if (this.closing) return fd[Symbol.dispose]();
    if (this.current !== undefined) {
      this.log.warn("a second client is turned away");
      return turnAway(fd);
    }
    const connection = new ClientConnection(fd, this.fn, this.log);
    const ended = connection
      .run()
      .catch((error) => {
        if (!this.closing) this.log.error("the function could not be reset", error);
      })
      .then(() => {
        this.current = undefined;
      });
    this.current = { connection, ended };
  }
}
