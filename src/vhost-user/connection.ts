import { VhostdError } from "../base/errors.ts";
import type { OwnedFd } from "../native/fd.ts";
import { type Framing, MessageSocket } from "../native/message-socket.ts";
import {
  encodeMessage,
  FLAG_NEED_REPLY,
  FLAG_REPLY,
  FLAG_VERSION_MASK,
  HEADER,
  MEM_TABLE_REGIONS_MAX,
  PROTOCOL_VERSION,
} from "./messages.ts";

/** A message as it came, its header understood. Disposing of it closes the fds that nobody has taken out. */
export interface Incoming extends Disposable {
  readonly request: number;
  readonly isReply: boolean;
  /** The sender waits for a reply (REPLY_ACK). */
  readonly needReply: boolean;
  readonly payload: Uint8Array;
  /** Who takes one over removes it from the array. */
  readonly fds: OwnedFd[];
}

/** One vhost-user channel: the connection itself, or the back-end's own channel. */
export class Connection implements Disposable {
  private readonly socket: MessageSocket;

  /** @param payloadLimit bytes that a request may carry at most; throws VhostdError protocol for an unknown request */
  constructor(fd: OwnedFd, payloadLimit: (request: number) => number) {
    this.socket = new MessageSocket(fd, framing(payloadLimit));
  }

  /** The next message, or undefined where the peer hung up between two. One call at a time. */
  async receive(): Promise<Incoming | undefined> {
    const message = await this.socket.receive();
    if (message === undefined) return undefined;
    const { request, flags } = HEADER.read(message.header);
    return {
      request,
      isReply: (flags & FLAG_REPLY) !== 0,
      needReply: (flags & FLAG_NEED_REPLY) !== 0,
      payload: message.body,
      fds: message.fds,
      [Symbol.dispose]: () => message[Symbol.dispose](),
    };
  }

  async reply(request: number, payload: Uint8Array): Promise<void> {
    await this.socket.send(encodeMessage(request, PROTOCOL_VERSION | FLAG_REPLY, payload));
  }

  async request(request: number, payload: Uint8Array, needReply: boolean, fds: readonly number[] = []): Promise<void> {
    const flags = PROTOCOL_VERSION | (needReply ? FLAG_NEED_REPLY : 0);
    await this.socket.send(encodeMessage(request, flags, payload), fds);
  }

  get fd(): number {
    return this.socket.fd;
  }

  get closed(): boolean {
    return this.socket.closed;
  }

  /** Stops listening and gives the fd back unclosed. */
  abandon(): OwnedFd {
    return this.socket.abandon();
  }

  [Symbol.dispose](): void {
    this.socket[Symbol.dispose]();
  }
}

function framing(payloadLimit: (request: number) => number): Framing {
  return {
    headerSize: HEADER.size,
    maxFds: MEM_TABLE_REGIONS_MAX,
    bodySize(bytes) {
      const { request, flags, size } = HEADER.read(bytes);
      const version = flags & FLAG_VERSION_MASK;
      if (version !== PROTOCOL_VERSION) {
        throw new VhostdError(
          "protocol",
          `request ${request} has protocol version ${version}, not ${PROTOCOL_VERSION}`,
        );
      }
      const limit = payloadLimit(request);
      if (size > limit) {
        throw new VhostdError(
          "protocol",
          `request ${request} announces ${size} bytes of payload, at most ${limit} fit`,
        );
      }
      return size;
    },
  };
}
