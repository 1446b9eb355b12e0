import { unlinkSync } from "node:fs";
import { asError, VhostdError } from "../base/errors.ts";
import type { Logger } from "../base/log.ts";
import { CloseLane, type OwnedFd } from "../native/fd.ts";
import { type Watch, watch } from "../native/poller.ts";
import { accept, connectUnix, listenAgain, listenUnix, peerCredentials, shutDown } from "../native/sys.ts";

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
  /** Whether a front-end of the process with this id is served now. All are, where left out. */
  readonly welcomes?: (pid: number) => boolean;
  /** Whether the process with this id is part of this daemon: it is no front-end. None is, where left out. */
  readonly isOurs?: (pid: number) => boolean;
  /** After those that were not welcome the next ones are looked at so much later. Milliseconds; 1 s. */
  readonly turnAwayInterval?: number;
}

/** So many that are not welcome are done with at a time: those that wait behind them do not pay for each of them. */
const TURNED_AWAY_AT_ONCE = 16;

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
  private readonly turnAwayInterval: number;
  /** Of all connections: what a front-end leaves behind that cannot be closed counts against the next one, too. */
  private readonly lane = new CloseLane();

  /** @param onConnection takes ownership of the fd and calls `markFree` when it is done with it */
  constructor(
    private readonly options: EndpointOptions,
    private readonly onConnection: (fd: OwnedFd) => void,
    private readonly log: Logger,
  ) {
    this.retryInterval = options.retryInterval ?? 250;
    this.turnAwayInterval = options.turnAwayInterval ?? 1000;
  }

  /**
   * Begins to connect or to listen.
   * @param taken there is a connection already (a session that was revived)
   * @param listener that an earlier process listened at; taken
   * @throws SystemError where the socket cannot be made, or `listener` is none (server mode)
   */
  start(taken = false, listener?: OwnedFd): void {
    if (this.state !== "new") {
      listener?.[Symbol.dispose]();
      return;
    }
    this.state = taken ? "taken" : "waiting";
    if (this.options.mode === "server") this.listen(listener);
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

  /** The socket that is listened at, borrowed: those who connect to it while nobody is here wait. */
  get listenerFd(): number | undefined {
    return this.listener?.fd.number;
  }

  /** Nobody is served by this process any more; whoever holds a duplicate of the listening socket goes on. */
  abandon(): void {
    this.state = "closed";
    clearTimeout(this.retry);
    clearTimeout(this.refusal);
    this.listener?.watch[Symbol.dispose]();
    this.listener?.fd[Symbol.dispose]();
    this.listener = undefined;
  }

  [Symbol.dispose](): void {
    const isListening = this.listener !== undefined;
    if (this.listener !== undefined) shutDown(this.listener.fd.number);
    this.abandon();
    if (!isListening) return;
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
      fd = this.dial();
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
    if (this.isWelcome(fd)) this.take(fd);
    else this.connectLater(this.turnAwayInterval);
  }

  /** Whoever may write to the directory can have the path lead anywhere. @throws SystemError, VhostdError */
  private dial(): OwnedFd {
    const { path } = this.options;
    const fd = connectUnix(path, this.lane);
    const { pid } = peerCredentials(fd.number);
    if (!this.isOurs(pid)) return fd;
    this.hangUp(fd);
    throw new VhostdError("socketPath", `at ${path} listens no VMM but process ${pid}, which is this daemon's own`);
  }

  private connectLater(interval = this.retryInterval): void {
    this.retry = setTimeout(() => this.connect(), interval);
  }

  /** The fd of one that is not is closed. */
  private isWelcome(fd: OwnedFd): boolean {
    const { pid } = peerCredentials(fd.number);
    if (!this.isOurs(pid) && (this.options.welcomes?.(pid) ?? true)) return true;
    this.log.debug(`process ${pid} was turned away`);
    this.hangUp(fd);
    return false;
  }

  private isOurs(pid: number): boolean {
    return this.options.isOurs?.(pid) ?? false;
  }

  private listen(before: OwnedFd | undefined): void {
    using undo = new DisposableStack();
    const fd = undo.use(before ?? listenUnix(this.options.path, this.options.socketMode ?? 0o660));
    // Who connects knows this daemon by the process that listens: also another VF of it, whose path was made to lead here.
    if (before !== undefined) listenAgain(fd.number);
    this.listener = { fd, watch: watch(fd.number, "in", () => this.onReadable(fd)) };
    undo.move();
  }

  /** While a VMM that died is being cleaned up after, the next one waits; while one is served, the next is refused. */
  private onReadable(listener: OwnedFd): void {
    if (this.state === "waiting") this.acceptWelcome(listener);
    else this.refusal = setTimeout(() => this.refuseOne(listener), this.options.patience ?? 1000);
  }

  /** The first that is; those before it are turned away. */
  private acceptWelcome(listener: OwnedFd): void {
    for (let turnedAway = 0; turnedAway < TURNED_AWAY_AT_ONCE; turnedAway++) {
      const fd = this.acceptOne(listener);
      if (fd === "failed") return;
      if (fd === "none" && turnedAway > 0) break;
      if (fd !== "none" && !this.isWelcome(fd)) continue;
      if (fd !== "none") this.take(fd);
      this.listener?.watch.rearm();
      return;
    }
    // Not at once: they may come back without end.
    this.rearmLater(this.turnAwayInterval);
  }

  private refuseOne(listener: OwnedFd): void {
    const fd = this.acceptOne(listener);
    if (fd === "failed") return;
    if (fd !== "none") {
      this.hangUp(fd);
      this.log.warn(`a second connection to ${this.options.path} was refused, one is in use`);
    }
    this.listener?.watch.rearm();
  }

  /** @returns "failed" where it is tried again later, because the connection still waits */
  private acceptOne(listener: OwnedFd): OwnedFd | "none" | "failed" {
    try {
      this.checkLane();
      const fd = accept(listener.number, this.lane);
      this.lastFailure = undefined;
      return fd ?? "none";
    } catch (error) {
      const { message } = asError(error);
      if (message !== this.lastFailure) this.log.error(`${this.options.path} cannot accept a connection: ${message}`);
      this.lastFailure = message;
      this.rearmLater(this.retryInterval);
      return "failed";
    }
  }

  private rearmLater(interval: number): void {
    this.retry = setTimeout(() => this.listener?.watch.rearm(), interval);
  }

  private hangUp(fd: OwnedFd): void {
    shutDown(fd.number);
    fd[Symbol.dispose]();
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
