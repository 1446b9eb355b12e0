import type { OwnedFd } from "../../../src/native/fd.ts";
import { MessageSocket } from "../../../src/native/message-socket.ts";
import { encodeMessage, HEADER, PROTOCOL_VERSION } from "../../../src/vhost-user/messages.ts";

/** A message as a front-end sees it. The fds are the receiver's to close. */
export interface WireMessage {
  readonly request: number;
  readonly flags: number;
  readonly payload: Uint8Array;
  readonly fds: OwnedFd[];
}

/** Messages over a socket, none of them checked: a test decides what is right. */
export class WireChannel implements Disposable {
  private readonly socket: MessageSocket;

  /** Takes ownership of a connected socket. */
  constructor(fd: OwnedFd) {
    this.socket = new MessageSocket(fd, {
      headerSize: HEADER.size,
      maxFds: 253,
      bodySize: (header) => HEADER.read(header).size,
    });
  }

  /** Any bytes with any fds. */
  async sendRaw(bytes: Uint8Array, fds: readonly number[] = []): Promise<void> {
    await this.socket.send(bytes, fds);
  }

  async send(request: number, payload: Uint8Array, fds: readonly number[] = [], flags = 0): Promise<void> {
    await this.sendRaw(encodeMessage(request, PROTOCOL_VERSION | flags, payload), fds);
  }

  /** Undefined where the other end hung up. */
  async receive(): Promise<WireMessage | undefined> {
    const message = await this.socket.receive();
    if (message === undefined) return undefined;
    const { request, flags } = HEADER.read(message.header);
    return { request, flags, payload: message.body, fds: message.fds };
  }

  get fd(): number {
    return this.socket.fd;
  }

  [Symbol.dispose](): void {
    this.socket[Symbol.dispose]();
  }
}

/** The front-end's side of the back-end's own channel: notes what comes. */
export class BackendRequests implements Disposable {
  readonly received: WireMessage[] = [];
  private waiting: (() => void)[] = [];
  private readonly channel: WireChannel;

  constructor(fd: OwnedFd) {
    this.channel = new WireChannel(fd);
    void this.serve();
  }

  /** Resolves when `count` requests have come. */
  async wait(count: number): Promise<void> {
    while (this.received.length < count) await new Promise<void>((resolve) => this.waiting.push(resolve));
  }

  [Symbol.dispose](): void {
    this.channel[Symbol.dispose]();
    for (const message of this.received) for (const fd of message.fds) fd[Symbol.dispose]();
  }

  private async serve(): Promise<void> {
    try {
      for (let message = await this.channel.receive(); message !== undefined; message = await this.channel.receive()) {
        this.received.push(message);
        for (const wake of this.waiting.splice(0)) wake();
      }
    } catch {
      // The test has disposed of the channel, or the back-end hung up in mid-message: there is nothing more to note.
    }
  }
}
