import { unlinkSync } from "node:fs";
import { asError, VhostdError } from "../base/errors.ts";
import type { Logger } from "../base/log.ts";
import { CloseLane, type OwnedFd } from "../native/fd.ts";
import { type Watch, watch } from "../native/poller.ts";
import { accept, connectUnix, listenUnix, shutDown } from "../native/sys.ts";

export interface EndpointOptions {
  readonly path: string;
  /** client: the VMM listens and we connect, again and again; server: we listen. */
  readonly mode: "client" | "server";
  /** Milliseconds between two attempts to connect. */
  readonly retryInterval?: number;
  /** Permissions of the socket in server mode. */
  readonly socketMode?: number;
  /** Server mode: for how long a second connection may wait for the first one to be undone. Milliseconds; 1 s. */
  readonly patience?: number;
}

type EndpointState = "new" | "waiting" | "taken" | "closed";

/** Where the connections of one VF come from: one at a time. */
export class Endpoint implements Disposable {
  private state: EndpointState = "new";
  private retry: ReturnType<typeof setTimeout> | undefined;
  private refusal: ReturnType<typeof setTimeout> | undefined;
  private listener: { fd: OwnedFd; watch: Watch } | undefined;
  /** The failure that was logged last; the same one is not logged again. */
  private lastFailure: string | undefined;
  private readonly retryInterval: number;
  /** Of all connections: what a front-end leaves behind that cannot be closed counts against the next one, too. */
  private readonly lane = new CloseLane();

  /** @param onConnection takes ownership of the fd and calls `markFree` when it is done with it */
  constructor(
    private readonly options: EndpointOptions,
    private readonly onConnection: (fd: OwnedFd) => void,
    private readonly log: Logger,
  ) {
    this.retryInterval = options.retryInterval ?? 250;
  }

  /**
   * Begins to connect or to listen.
   * @param taken there is a connection already (a session that was revived)
   * @throws SystemError where the socket cannot be made (server mode)
   */
  start(taken = false): void {
    if (this.state !== "new") return;
    this.state = taken ? "taken" : "waiting";
    if (this.options.mode === "server") this.listen();
    else if (!taken) this.connect();
  }

  /** The connection is gone: the next one is welcome. */
  markFree(): void {
    if (this.state !== "taken") return;
    this.state = "waiting";
    clearTimeout(this.refusal);
    if (this.options.mode === "client") this.connectLater();
    else this.listener?.watch.rearm();
  }

  [Symbol.dispose](): void {
    this.state = "closed";
    clearTimeout(this.retry);
    clearTimeout(this.refusal);
    if (this.listener === undefined) return;
    this.listener.watch[Symbol.dispose]();
    shutDown(this.listener.fd.number);
    this.listener.fd[Symbol.dispose]();
    this.listener = undefined;
    try {
      unlinkSync(this.options.path);
    } catch (error) {
      this.log.debug(`${this.options.path} could not be removed: ${asError(error).message}`);
    }
  }

  private connect(): void {
    let fd: OwnedFd;
    try {
      this.checkLane();
      fd = connectUnix(this.options.path, this.lane);
    } catch (error) {
      const { message } = asError(error);
      if (message !== this.lastFailure) {
        this.log.info(`no front-end yet: ${message}; trying every ${this.retryInterval} ms`);
      }
      this.lastFailure = message;
      this.connectLater();
      return;
    }
    this.lastFailure = undefined;
    this.take(fd);
  }

  private connectLater(): void {
    this.retry = setTimeout(() => this.connect(), this.retryInterval);
  }

  private listen(): void {
    const fd = listenUnix(this.options.path, this.options.socketMode ?? 0o660);
    this.listener = { fd, watch: watch(fd.number, "in", () => this.onReadable(fd)) };
  }

  /** While a VMM that died is being cleaned up after, the next one waits; while one is served, the next is refused. */
  private onReadable(listener: OwnedFd): void {
    if (this.state === "waiting") {
      this.acceptOne(listener, (fd) => this.take(fd));
      return;
    }
    this.refusal = setTimeout(() => {
      this.acceptOne(listener, (fd) => {
        shutDown(fd.number);
        fd[Symbol.dispose]();
        this.log.warn(`a second connection to ${this.options.path} was refused, one is in use`);
      });
    }, this.options.patience ?? 1000);
  }

  /** Then waits for the next one. Not at once after a failure: the connection still waits. */
  private acceptOne(listener: OwnedFd, use: (fd: OwnedFd) => void): void {
    let fd: OwnedFd | undefined;
    try {
      this.checkLane();
      fd = accept(listener.number, this.lane);
    } catch (error) {
      const { message } = asError(error);
      if (message !== this.lastFailure) this.log.error(`${this.options.path} cannot accept a connection: ${message}`);
      this.lastFailure = message;
      this.retry = setTimeout(() => this.listener?.watch.rearm(), this.retryInterval);
      return;
    }
    this.lastFailure = undefined;
    if (fd !== undefined) use(fd);
    this.listener?.watch.rearm();
  }

  /** @throws VhostdError limitExceeded */
  private checkLane(): void {
    if (!this.lane.full) return;
    throw new VhostdError("limitExceeded", "file descriptors of earlier connections cannot be closed");
  }

  private take(fd: OwnedFd): void {
    this.state = "taken";
    this.onConnection(fd);
  }
}
