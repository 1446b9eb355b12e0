import { VhostdError } from "../base/errors.ts";
import type { OwnedFd } from "../native/fd.ts";
import { type Framing, type Message, MessageSocket } from "../native/message-socket.ts";
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

/** A message that may still lie in the socket. */
export interface PeekedIncoming extends Incoming {
  /** It does. What came in pieces was taken out. */
  readonly left: boolean;
  readonly header: Uint8Array;
  /** Takes it out, where it is `left`. @throws VhostdError protocol */
  finish(): void;
}

export interface ConnectionOptions {
  /** Bytes that a request may carry at most. @throws VhostdError protocol for an unknown request */
  payloadLimit(request: number): number;
  /** Whether a request may carry fds; each may, where left out. */
  mayCarryFds?(request: number): boolean;
  /** `peek` has to take a message out of the socket. */
  beforeTaking?(): void;
}

/** One vhost-user connection. The back-end's own channel is another class: it is never read. */
export class Connection implements Disposable {
  private readonly socket: MessageSocket;

  constructor(fd: OwnedFd, options: ConnectionOptions) {
    this.socket = new MessageSocket(fd, framing(options), { beforeTaking: () => options.beforeTaking?.() });
  }

  /** The next message, or undefined where the peer hung up between two. One call at a time. */
  async receive(): Promise<Incoming | undefined> {
    const message = await this.socket.receive();
    return message === undefined ? undefined : incoming(message);
  }

  /** As `receive`, and leaves it in the socket where that is possible. */
  async peek(): Promise<PeekedIncoming | undefined> {
    const message = await this.socket.peek();
    if (message === undefined) return undefined;
    const { header, left } = message;
    return { ...incoming(message), header, left, finish: () => message.finish() };
  }

  /** Whether exactly these bytes lie first in the socket. */
  startsWith(bytes: Uint8Array): boolean {
    return this.socket.startsWith(bytes);
  }

  /** The bytes that lie first in the socket, which may be fewer than `size`. */
  first(size: number): Uint8Array {
    return this.socket.first(size);
  }

  /** The peer sends nothing more. What it sent before may still lie in the socket. */
  get hungUp(): boolean {
    return this.socket.hungUp;
  }

  /** A whole message, or the rest of one. */
  async send(bytes: Uint8Array): Promise<void> {
    await this.socket.send(bytes);
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

function incoming(message: Message): Incoming {
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

/** An answer as a whole message. */
export function encodeReply(request: number, payload: Uint8Array): Uint8Array {
  return encodeMessage(request, PROTOCOL_VERSION | FLAG_REPLY, payload);
}

function framing({ payloadLimit, mayCarryFds }: ConnectionOptions): Framing {
  return {
    headerSize: HEADER.size,
    maxFds: MEM_TABLE_REGIONS_MAX,
    mayCarryFds: (header) => mayCarryFds?.(HEADER.read(header).request) ?? true,
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
