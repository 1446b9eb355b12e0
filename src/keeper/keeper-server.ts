import { rmSync } from "node:fs";
import { asError, VhostdError } from "../base/errors.ts";
import type { Logger } from "../base/log.ts";
import type { OwnedFd } from "../native/fd.ts";
import { type Watch, watch } from "../native/poller.ts";
import { accept, listenUnix, peerCredentials, shutDown } from "../native/sys.ts";
import { KeeperConnection, type KeeperIdentity } from "./keeper-connection.ts";
import type { Store } from "./store.ts";

/** Milliseconds before a connection that could not be accepted is accepted. */
const RETRY_INTERVAL = 100;
const SOCKET_MODE = 0o600;
/** Connections at once, those that are told that they are not served included. */
const CONNECTIONS_MAX = 16;

export interface KeeperServerOptions {
  readonly path: string;
  readonly identity: KeeperIdentity;
  readonly log: Logger;
  /** Who may connect, beside root: a user id. */
  readonly user: number;
}

/** Serves a store to one client at a time. What it holds outlives every client. */
export class KeeperServer implements Disposable {
  private readonly listener: OwnedFd;
  private readonly watch: Watch;
  private readonly connections = new Set<KeeperConnection>();
  private retry: ReturnType<typeof setTimeout> | undefined;
  private served: { readonly connection: KeeperConnection; readonly pid: number } | undefined;

  /** @throws SystemError where the socket cannot be made */
  constructor(
    private readonly store: Store,
    private readonly options: KeeperServerOptions,
  ) {
    this.listener = listenUnix(options.path, SOCKET_MODE);
    this.watch = watch(this.listener.number, "in", () => this.acceptAll());
  }

  [Symbol.dispose](): void {
    clearTimeout(this.retry);
    this.watch[Symbol.dispose]();
    rmSync(this.options.path, { force: true });
    shutDown(this.listener.number);
    this.listener[Symbol.dispose]();
    for (const connection of this.connections) connection[Symbol.dispose]();
  }

  private acceptAll(): void {
    const { log } = this.options;
    try {
      for (let fd = accept(this.listener.number); fd !== undefined; fd = accept(this.listener.number)) this.take(fd);
      this.watch.rearm();
    } catch (error) {
      log.error("a connection cannot be accepted", asError(error));
      // It still waits: at once it would be reported again, without end.
      this.retry = setTimeout(() => this.watch.rearm(), RETRY_INTERVAL);
    }
  }

  private take(fd: OwnedFd): void {
    const { log, user } = this.options;
    const { pid, uid } = peerCredentials(fd.number);
    const refusal =
      uid !== 0 && uid !== user
        ? `process ${pid} is of user ${uid}`
        : this.connections.size >= CONNECTIONS_MAX
          ? `there are ${CONNECTIONS_MAX} connections`
          : undefined;
    if (refusal !== undefined) {
      log.warn(`a connection was refused: ${refusal}`);
      shutDown(fd.number);
      fd[Symbol.dispose]();
      return;
    }
    void this.serve(fd, pid);
  }

  private async serve(fd: OwnedFd, pid: number): Promise<void> {
    const { identity, log } = this.options;
    using connection = new KeeperConnection(fd, this.store, () => {
      // What it has stored may be its own end of the connection: that is not closed with it.
      if (this.served !== undefined && isGone(this.served.pid)) this.served.connection[Symbol.dispose]();
      else if (this.served !== undefined) {
        throw new VhostdError("busy", `process ${this.served.pid} is connected to the keeper`, {
          fix: "end that daemon first",
        });
      }
      this.served = { connection, pid };
      log.info(`process ${pid} is served`);
      return identity;
    });
    this.connections.add(connection);
    try {
      await connection.run();
    } catch (error) {
      log.warn(`process ${pid} is hung up on`, asError(error));
    }
    this.connections.delete(connection);
    if (this.served?.connection !== connection) return;
    this.served = undefined;
    const { records, fds } = this.store.totals;
    log.info(`process ${pid} is served no more; ${records} records with ${fds} fds are kept`);
  }
}

function isGone(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return false;
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === "ESRCH";
  }
}
