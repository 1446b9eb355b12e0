import { lstat, unlink } from "node:fs/promises";
import { type AddressInfo, createServer, type ListenOptions, type Server, type Socket } from "node:net";
import { Deadline } from "../base/deadline.ts";
import { errnoText, VhostdError } from "../base/errors.ts";
import type { Logger } from "../base/log.ts";
import { isSocketAlive, MAX_SOCKET_PATH } from "./client.ts";
import { Connection, type ConnectionLimits, encode, hangUp } from "./connection.ts";
import type { Method } from "./method.ts";
import { toErrorObject } from "./protocol.ts";
import { REQUEST_LIMITS } from "./splitter.ts";
import type { LoopbackAddress } from "./tcp-address.ts";

export interface ServerLimits extends ConnectionLimits {
  /** Connections at once. */
  readonly clients: number;
}

export const SERVER_LIMITS: ServerLimits = {
  ...REQUEST_LIMITS,
  partialTimeout: 10_000,
  sendTimeout: 30_000,
  unsent: 1 << 20,
  clients: 1000,
};

export interface ServerOptions {
  readonly log: Logger;
  readonly limits?: Partial<ServerLimits>;
  /** Reads who is at the other end of a unix socket, for the log. The fd is borrowed for the call. */
  readonly peerCredentials?: (fd: number) => { readonly pid: number; readonly uid: number; readonly gid: number };
}

/** Serves methods by JSON-RPC 2.0, over any number of listening sockets. */
export class RpcServer {
  private readonly methods: ReadonlyMap<string, Method>;
  private readonly limits: ServerLimits;
  private readonly listeners = new Set<Server>();
  private readonly connections = new Map<Connection, Promise<void>>();

  /** @throws Error where two methods have one name */
  constructor(
    methods: Iterable<Method>,
    private readonly options: ServerOptions,
  ) {
    const table = new Map<string, Method>();
    for (const method of methods) {
      if (table.has(method.name)) throw new Error(`the method ${method.name} is defined twice`);
      table.set(method.name, method);
    }
    this.methods = table;
    this.limits = { ...SERVER_LIMITS, ...options.limits };
  }

  /** Connections open now. */
  get clients(): number {
    return this.connections.size;
  }

  /**
   * Listens at `path`. A socket file that nobody listens on any more is replaced; the file is removed by stop().
   * @param mode permissions of the socket file, 0o600 or 0o660
   * @throws VhostdError with EADDRINUSE where someone is alive behind the path
   */
  async listenUnix(path: string, mode: number): Promise<void> {
    await makeWay(path);
    // bind(2) takes the permissions from the umask, synchronously: a later chmod would leave a moment of others.
    const umask = process.umask(0o777 & ~mode);
    try {
      const listening = this.listen({ path });
      process.umask(umask);
      await listening;
    } finally {
      process.umask(umask);
    }
  }

  /** @returns the port, for an address that left it to the system with 0 */
  async listenTcp({ host, port }: LoopbackAddress): Promise<number> {
    const server = await this.listen({ host, port });
    return (server.address() as AddressInfo).port;
  }

  /** Takes no more requests, lets those in progress end within `timeout` milliseconds, closes every connection. */
  async stop(timeout = 5000): Promise<void> {
    for (const listener of this.listeners) listener.close();
    this.listeners.clear();
    for (const connection of this.connections.keys()) connection.stop();
    try {
      const ended = Promise.all(this.connections.values());
      await Deadline.after(timeout, "requests in progress at the stop of the control interface").race(ended);
    } catch (error) {
      this.options.log.warn("requests were in progress when the control interface stopped", error);
      for (const connection of this.connections.keys()) connection.destroy();
    }
  }

  private listen(where: ListenOptions): Promise<Server> {
    const { promise, resolve, reject } = Promise.withResolvers<Server>();
    const server = createServer({ allowHalfOpen: true }, (socket) => this.accept(socket));
    const name = where.path ?? `${where.host}:${where.port}`;
    server.once("error", (error: NodeJS.ErrnoException) => {
      const errno = Math.abs(error.errno ?? 5);
      reject(new VhostdError(errno, `cannot listen at ${name}: ${errnoText(errno)}`, { cause: error }));
    });
    server.once("listening", () => {
      this.listeners.add(server);
      server.on("error", (error) => this.options.log.error(`the listening socket ${name} failed`, error));
      resolve(server);
    });
    server.listen(where);
    return promise;
  }

  private accept(socket: Socket): void {
    if (this.connections.size >= this.limits.clients) {
      this.options.log.warn(`a client was refused: there are ${this.connections.size} connections, the limit`);
      const error = new VhostdError(
        "limitExceeded",
        `there are ${this.limits.clients} connections, no more are served`,
      );
      socket.on("error", () => {});
      socket.write(encode({ id: null, error: toErrorObject(error) }));
      void hangUp(socket);
      return;
    }
    const client = this.identify(socket);
    this.options.log.debug(`${client} connected`);
    const connection = new Connection(socket, this.methods, client, this.limits, this.options.log);
    const served = connection.serve().finally(() => {
      this.connections.delete(connection);
      this.options.log.debug(`${client} disconnected`);
    });
    this.connections.set(connection, served);
  }

  private identify(socket: Socket): string {
    if (socket.remoteAddress !== undefined) return `${socket.remoteAddress}:${socket.remotePort}`;
    // Neither Node's types nor Bun's tell the fd of a net.Socket; the handle has it.
    const fd = (socket as unknown as { readonly _handle?: { readonly fd?: number } })._handle?.fd;
    if (fd === undefined || fd < 0 || this.options.peerCredentials === undefined) return "a local client";
    try {
      const { pid, uid } = this.options.peerCredentials(fd);
      return `pid ${pid} uid ${uid}`;
    } catch {
      return "a local client that has gone";
    }
  }
}

/** Removes the socket file of a process that is gone. */
async function makeWay(path: string): Promise<void> {
  if (Buffer.byteLength(path) > MAX_SOCKET_PATH) {
    throw new VhostdError(36, `the socket path ${path} is longer than ${MAX_SOCKET_PATH} bytes`, {
      fix: "choose a shorter directory",
    });
  }
  const found = await lstat(path).catch(() => undefined);
  if (found === undefined) return;
  if (!found.isSocket()) {
    throw new VhostdError("exists", `${path} exists and is not a socket`, { fix: "remove it, or choose another path" });
  }
  if (await isSocketAlive(path)) {
    throw new VhostdError(98, `another process listens at ${path}`, { fix: "stop it, or choose another directory" });
  }
  // Another process may have made way at the same moment; who binds is decided by the kernel.
  await unlink(path).catch((error: NodeJS.ErrnoException) => {
    if (error.code !== "ENOENT") throw error;
  });
}
