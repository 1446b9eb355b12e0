import type { Socket } from "node:net";
import { asError, VhostdError } from "../base/errors.ts";
import type { Logger } from "../base/log.ts";
import type { Call, Method } from "./method.ts";
import { ProtocolError, parseRequest, type Request, type RequestId, RpcCode, toErrorObject } from "./protocol.ts";
import { type MessageLimits, MessageSplitter } from "./splitter.ts";

/** What one client may cost this process. Times in milliseconds. */
export interface ConnectionLimits extends MessageLimits {
  /** For a message that has begun to be complete. */
  readonly partialTimeout: number;
  /** For the client to take what it was sent. */
  readonly sendTimeout: number;
  /** Bytes of notifications that may wait for the client. */
  readonly unsent: number;
}

/** After the last answer, for the client to read it and hang up, milliseconds. */
const LINGER = 1000;

/**
 * One client. Its requests are carried out in their order, and the next is taken from the socket only when the one
 * before is answered and the answer is on its way: nothing queues up here, whatever the client sends.
 */
export class Connection {
  private readonly splitter: MessageSplitter;
  private readonly closeHandlers: (() => void)[] = [];
  private partialTimer: ReturnType<typeof setTimeout> | undefined;
  /** One object a connection, so that a handler can know its caller again. */
  private readonly call: Call;
  private stopping = false;
  private busy = false;

  constructor(
    private readonly socket: Socket,
    private readonly methods: ReadonlyMap<string, Method>,
    private readonly client: string,
    private readonly limits: ConnectionLimits,
    private readonly log: Logger,
  ) {
    this.splitter = new MessageSplitter(limits);
    this.call = {
      client,
      notify: (method, params) => this.notify(method, params),
      log: (text) => this.log.info(`${client}: ${text}`),
      onClose: (handler) => {
        if (socket.destroyed) handler();
        else this.closeHandlers.push(handler);
      },
    };
    socket.on("close", () => {
      clearTimeout(this.partialTimer);
      for (const handler of this.closeHandlers.splice(0)) handler();
    });
    // The error also ends the iteration in serve() or a wait for "drain"; without a listener it would end the process.
    socket.on("error", (error) => this.log.debug(`${client}: ${error.message}`));
  }

  /** Serves until the client hangs up or has to be cut off. Never rejects. */
  async serve(): Promise<void> {
    try {
      for await (const chunk of this.socket.iterator({ destroyOnReturn: false })) {
        for (const message of this.splitter.push(chunk as Uint8Array)) {
          this.disarm();
          await this.serveOne(message);
          if (this.stopping) return;
        }
        this.watchPartial();
      }
      if (this.splitter.partial) throw new VhostdError("protocol", "the connection ended inside a message");
    } catch (error) {
      if (!this.socket.destroyed) this.refuse(asError(error));
    } finally {
      this.disarm();
      await hangUp(this.socket);
    }
  }

  /** No further request is taken; the one in progress is answered. */
  stop(): void {
    this.stopping = true;
    if (!this.busy) this.socket.destroy();
  }

  destroy(): void {
    this.socket.destroy();
  }

  private async serveOne(message: Uint8Array): Promise<void> {
    this.busy = true;
    try {
      const answer = await this.answer(message);
      if (answer !== undefined) await this.send(answer);
    } finally {
      this.busy = false;
    }
  }

  private async answer(message: Uint8Array): Promise<string | undefined> {
    let request: Request | undefined;
    try {
      request = parseRequest(message);
      const method = this.methods.get(request.method);
      if (method === undefined) {
        const names = [...this.methods.keys()].join(", ");
        throw new ProtocolError(RpcCode.methodNotFound, `there is no method "${request.method.slice(0, 64)}"`, {
          fix: `use one of: ${names}`,
        });
      }
      const result = await method.invoke(request.params, this.call);
      return request.id === undefined ? undefined : encode({ id: request.id, result: result ?? null });
    } catch (error) {
      if (!(error instanceof ProtocolError) && !(error instanceof VhostdError)) {
        this.log.error(`${this.client}: ${request?.method ?? "request"} failed unexpectedly`, error);
      }
      if (request !== undefined && request.id === undefined) return undefined;
      return encode({ id: request?.id ?? idOf(error), error: toErrorObject(error) });
    }
  }

  private notify(method: string, params: unknown): void {
    if (!this.socket.writable) return;
    if (this.socket.writableLength > this.limits.unsent) {
      this.log.warn(
        `${this.client}: cut off, more than ${this.limits.unsent} bytes of notifications wait to be read by it`,
      );
      this.socket.destroy();
      return;
    }
    this.socket.write(encode({ method, params }));
  }

  /** Waits while the client's side is full, under the limit. */
  private async send(text: string): Promise<void> {
    if (!this.socket.writable) return;
    if (this.socket.write(text)) return;
    await new Promise<void>((resolve) => {
      const timer = setTimeout(() => {
        this.log.warn(`${this.client}: cut off, it did not read its answers for ${this.limits.sendTimeout} ms`);
        this.socket.destroy();
      }, this.limits.sendTimeout);
      const done = () => {
        clearTimeout(timer);
        this.socket.off("drain", done).off("close", done);
        resolve();
      };
      this.socket.on("drain", done).on("close", done);
      if (this.socket.destroyed) done();
    });
  }

  /** The deadline runs from the first byte of a message, so that single bytes now and then do not extend it. */
  private watchPartial(): void {
    if (!this.splitter.partial) {
      this.disarm();
      return;
    }
    this.partialTimer ??= setTimeout(() => {
      this.stopping = true;
      this.refuse(
        new VhostdError("timedOut", `a message was not complete within ${this.limits.partialTimeout} ms of its begin`),
      );
      void hangUp(this.socket);
    }, this.limits.partialTimeout);
  }

  private disarm(): void {
    clearTimeout(this.partialTimer);
    this.partialTimer = undefined;
  }

  /** Says why the stream cannot be read any further. */
  private refuse(error: Error): void {
    this.log.warn(`${this.client}: ${error.message}; its connection is closed`);
    if (!this.socket.writable) return;
    this.socket.write(encode({ id: null, error: { code: RpcCode.parseError, message: error.message } }));
  }
}

/**
 * Closes a connection so that the client can read the last answer: input that was not taken is thrown away meanwhile,
 * because closing a socket with unread data resets it.
 */
export async function hangUp(socket: Socket): Promise<void> {
  if (socket.destroyed) return;
  await new Promise<void>((resolve) => {
    const timer = setTimeout(() => socket.destroy(), LINGER);
    socket.once("close", () => {
      clearTimeout(timer);
      resolve();
    });
    socket.once("end", () => socket.destroySoon());
    socket.end();
    socket.resume();
    if (socket.readableEnded) socket.destroySoon();
  });
}

function idOf(error: unknown): RequestId {
  return error instanceof ProtocolError ? error.id : null;
}

export function encode(message: Readonly<Record<string, unknown>>): string {
  return `${JSON.stringify({ jsonrpc: "2.0", ...message })}\n`;
}
