import { asError } from "../base/errors.ts";
import type { Logger } from "../base/log.ts";
import type { OwnedFd } from "../native/fd.ts";
import { type Watch, watch } from "../native/poller.ts";
import { accept, listenUnix } from "../native/sys.ts";
import { ClientConnection, turnAway } from "./client-connection.ts";
import type { SoftFunction } from "./soft-function.ts";

/** Owner only: who can connect can have the function read and write any memory it gives. */
const SOCKET_MODE = 0o600;
/** Milliseconds that a client waits for one that is just going, before it is turned away. */
const HANDOVER = 500;

/** Serves one function on one unix socket, to one client at a time. */
export class FunctionServer {
  private readonly listener: OwnedFd;
  private readonly arrivals: Watch;
  private current: { readonly connection: ClientConnection; readonly ended: Promise<void> } | undefined;
  private readonly greetings = new Set<Promise<void>>();
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

  /** A client has the function. */
  get busy(): boolean {
    return this.current !== undefined;
  }

  /** Hangs up on the client and waits until the function is as new. The socket file stays. */
  async close(): Promise<void> {
    this.closing = true;
    this.arrivals[Symbol.dispose]();
    this.listener[Symbol.dispose]();
    this.current?.connection.close();
    await this.current?.ended;
    await Promise.all(this.greetings);
  }

  private onArrival(): void {
    for (let fd = accept(this.listener.number); fd !== undefined; fd = accept(this.listener.number)) {
      const greeting = this.greet(fd).catch((error) => this.log.warn("client turned away", asError(error)));
      this.greetings.add(greeting);
      void greeting.then(() => this.greetings.delete(greeting));
    }
    this.arrivals.rearm();
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
      .catch((error) => this.log.error("the function could not be reset", error))
      .then(() => {
        this.current = undefined;
      });
    this.current = { connection, ended };
  }
}
