import { connect, type Socket } from "node:net";
import type { Deadline } from "../base/deadline.ts";
import { asError, errnoText, VhostdError } from "../base/errors.ts";
import { type ErrorObject, fromErrorObject, parseJson } from "./protocol.ts";
import { MessageSplitter } from "./splitter.ts";

/** sun_path holds 108 bytes with the terminating zero (unix(7)). */
export const MAX_SOCKET_PATH = 107;

/** Answers come from a server that is trusted with more than requests: 2048 VFs are listed in one. */
const ANSWER_LIMITS = { size: 64 << 20, depth: 256 };

/** What arrives, before anything about it is known. */
interface Incoming {
  readonly id?: unknown;
  readonly method?: unknown;
  readonly params?: unknown;
  readonly result?: unknown;
  readonly error?: unknown;
}

interface Pending {
  readonly method: string;
  resolve(result: unknown): void;
  reject(error: Error): void;
}

/** The calling end of a control socket. Every wait has a deadline; a server that dies rejects every call at once. */
export class RpcClient implements Disposable {
  private readonly pending = new Map<number, Pending>();
  private readonly splitter = new MessageSplitter(ANSWER_LIMITS);
  private readonly ending = Promise.withResolvers<Error>();
  private notificationHandler: ((method: string, params: unknown) => void) | undefined;
  private nextId = 1;
  private failure: Error | undefined;

  private constructor(
    private readonly socket: Socket,
    private readonly path: string,
  ) {
    socket.on("data", (chunk: Uint8Array) => this.receive(chunk));
    socket.on("error", (error) => this.fail(this.lost(error)));
    socket.on("close", () => this.fail(this.lost()));
  }

  /** @throws VhostdError: ENOENT and ECONNREFUSED where nobody listens, EACCES, timedOut */
  static async connect(path: string, deadline: Deadline): Promise<RpcClient> {
    return new RpcClient(await openSocket(path, deadline), path);
  }

  /** Resolves with the reason when the connection has ended. */
  get closed(): Promise<Error> {
    return this.ending.promise;
  }

  /** Called with every notification from the server, in order. */
  onNotification(handler: (method: string, params: unknown) => void): void {
    this.notificationHandler = handler;
  }

  /**
   * @param params by name
   * @throws VhostdError with the number that the server gave; connectionLost; timedOut, after which the operation may
   *   still be carried out by the server
   */
  async call(method: string, params: Readonly<Record<string, unknown>>, deadline: Deadline): Promise<unknown> {
    if (this.failure !== undefined) throw this.failure;
    const id = this.nextId++;
    const { promise, resolve, reject } = Promise.withResolvers<unknown>();
    this.pending.set(id, { method, resolve, reject });
    this.socket.write(JSON.stringify({ jsonrpc: "2.0", id, method, params }));
    try {
      return await deadline.race(promise);
    } finally {
      this.pending.delete(id);
    }
  }

  [Symbol.dispose](): void {
    this.fail(new VhostdError("cancelled", `the connection to ${this.path} was closed here`));
  }

  private receive(chunk: Uint8Array): void {
    try {
      for (const message of this.splitter.push(chunk)) this.dispatch(parseJson(message) as Incoming);
    } catch (error) {
      this.fail(new VhostdError("protocol", `what ${this.path} answers is not JSON-RPC`, { cause: error }));
    }
  }

  private dispatch({ id, method, params, result, error }: Incoming): void {
    if (typeof method === "string") {
      this.notificationHandler?.(method, params);
      return;
    }
    const failure = isErrorObject(error) ? fromErrorObject(error) : undefined;
    const pending = this.pending.get(id as number);
    if (pending === undefined) {
      // An error without a request is about the connection as a whole, and the server closes it.
      if (failure !== undefined) this.fail(failure);
    } else if (failure === undefined) pending.resolve(result);
    else pending.reject(failure);
  }

  private fail(error: Error): void {
    if (this.failure !== undefined) return;
    this.failure = error;
    this.socket.destroy();
    this.ending.resolve(error);
    for (const { reject } of this.pending.values()) reject(error);
  }

  private lost(cause?: Error): VhostdError {
    const calls = [...this.pending.values()].map(({ method }) => method);
    const during = calls.length === 0 ? "" : ` before it answered ${calls.join(", ")}; whether it was done is unknown`;
    return new VhostdError("connectionLost", `the process behind ${this.path} closed the connection${during}`, {
      fix: "look into its log, and ask for the state once it runs again",
      ...(cause === undefined ? {} : { cause }),
    });
  }
}

/** Whether somebody accepts connections at a unix socket path. */
export async function isSocketAlive(path: string): Promise<boolean> {
  const { promise, resolve } = Promise.withResolvers<boolean>();
  const socket = connect({ path });
  socket.once("connect", () => resolve(true));
  // EAGAIN: alive, with a full backlog.
  socket.once("error", (error: NodeJS.ErrnoException) => resolve(error.code === "EAGAIN"));
  try {
    return await promise;
  } finally {
    socket.destroy();
  }
}

const RETRY_INTERVAL = 20;

async function openSocket(path: string, deadline: Deadline): Promise<Socket> {
  if (Buffer.byteLength(path) > MAX_SOCKET_PATH) {
    throw new VhostdError(36, `the socket path ${path} is longer than ${MAX_SOCKET_PATH} bytes`);
  }
  return await deadline.poll(() => tryOpen(path, deadline), RETRY_INTERVAL);
}

/** undefined where the server's backlog is full at the moment. */
async function tryOpen(path: string, deadline: Deadline): Promise<Socket | undefined> {
  const { promise, resolve, reject } = Promise.withResolvers<void>();
  const socket = connect({ path });
  socket.once("connect", resolve);
  socket.once("error", reject);
  try {
    await deadline.race(promise);
    return socket;
  } catch (thrown) {
    socket.destroy();
    if (thrown instanceof VhostdError) throw thrown;
    const error = asError(thrown) as NodeJS.ErrnoException;
    if (error.code === "EAGAIN") return undefined;
    const errno = Math.abs(error.errno ?? 5);
    const fix = FIXES[error.code ?? ""];
    throw new VhostdError(errno, `cannot connect to ${path}: ${errnoText(errno)}`, fix === undefined ? {} : { fix });
  }
}

const FIXES: Readonly<Record<string, string>> = {
  ENOENT: "start the daemon, or name its directory with --runtime-dir",
  ECONNREFUSED: "the process that made the socket is gone: start the daemon",
  EACCES: "run this as root or as a member of the socket's group",
};

function isErrorObject(value: unknown): value is ErrorObject {
  return (
    typeof value === "object" &&
    value !== null &&
    typeof (value as ErrorObject).code === "number" &&
    typeof (value as ErrorObject).message === "string"
  );
}
