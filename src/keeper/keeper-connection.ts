import { Deadline } from "../base/deadline.ts";
import { VhostdError } from "../base/errors.ts";
import type { OwnedFd } from "../native/fd.ts";
import { type Message, MessageSocket, sendAtOnce, takeBytes } from "../native/message-socket.ts";
import { isReadable, isUnixStream } from "../native/sys.ts";
import { IncomingRequest } from "./incoming-request.ts";
import {
  Command,
  DELIVERED,
  type Delivery,
  decodeDelivery,
  decodeJson,
  decodeMessage,
  decodePlaces,
  encodeJson,
  encodeMessage,
  encodeRefusal,
  HeaderFlag,
  KEEPER_FRAMING,
  KEEPER_VERSION,
  type KeeperMessage,
  partsOf,
  Readability,
  STILL_CLOSING,
  Stores,
} from "./messages.ts";
import type { Store, StoredRecord } from "./store.ts";

const NOTHING = new Uint8Array(0);
const STORING: ReadonlySet<number> = new Set([Command.put, Command.deliver]);
/** Bytes that are taken out of a socket at once. */
const TAKE_MAX = 64 << 10;

/** What a keeper says of itself. */
export type KeeperIdentity = {
  readonly protocol: number;
  readonly version: string;
  readonly build: string;
};

/** Milliseconds for a client to say hello. */
const GREETING_TIMEOUT = 5_000;

/** One client of the store, from connect to hang-up. What it had begun to say and not ended leaves no trace. */
export class KeeperConnection implements Disposable {
  private readonly socket: MessageSocket;
  private begun: IncomingRequest | undefined;
  private greeted = false;

  /**
   * Takes the fd.
   * @param welcome who the keeper is, for a client that is to be served; throws where it is not
   */
  constructor(
    fd: OwnedFd,
    private readonly store: Store,
    private readonly welcome: () => KeeperIdentity,
  ) {
    this.socket = new MessageSocket(fd, KEEPER_FRAMING);
  }

  /**
   * Serves the client until it hangs up.
   * @throws VhostdError protocol where it breaks the protocol; timedOut where it says nothing; what else its socket says
   */
  async run(): Promise<void> {
    const first = this.socket.receive();
    using message = await Deadline.after(GREETING_TIMEOUT, "a hello").race(first);
    if (message === undefined) return;
    await this.take(message);
    // One that is not served has been told why.
    if (!this.greeted) return;
    for (;;) {
      using message = await this.socket.receive();
      if (message === undefined) return;
      await this.take(message);
    }
  }

  [Symbol.dispose](): void {
    this.begun?.[Symbol.dispose]();
    this.socket[Symbol.dispose]();
  }

  private async take(message: Message): Promise<void> {
    const part = decodeMessage(message.header, message.body);
    if ((part.flags & HeaderFlag.reply) !== 0) throw new VhostdError("protocol", "a client sent an answer");
    if ((part.command === Command.hello) === this.greeted) {
      throw new VhostdError("protocol", `command ${part.command} came ${this.greeted ? "after" : "before"} hello`);
    }
    // Not in the lane of this connection: a file that takes long to close would hold up those of all records.
    this.begun ??= new IncomingRequest(part, this.store.laneOf(part.key), (size, fds) =>
      this.store.checkRecord(part.key, size, fds),
    );
    if (!this.begun.add(part, message.fds)) return;
    using request = this.begun;
    this.begun = undefined;
    try {
      await this.handle(part, request.take());
    } catch (error) {
      if (!(error instanceof VhostdError) || error.code === "protocol" || this.socket.closed) throw error;
      // An answer behind it is then not given: the record would be of before the message that is answered.
      if (error.code === "keeperStore" && STORING.has(part.command)) this.store.delete(part.key);
      await this.answer(part, encodeRefusal(error), [], HeaderFlag.error);
    }
  }

  /** Takes the fds. */
  private async handle(request: KeeperMessage, { bytes, fds }: StoredRecord): Promise<void> {
    const { command, key } = request;
    using unused = new DisposableStack();
    for (const fd of fds) unused.use(fd);
    switch (command) {
      case Command.hello:
        return await this.greet(request, bytes);
      case Command.put: {
        using _earlier = this.put(key, bytes, fds);
        unused.move();
        return await this.answer(request);
      }
      case Command.get:
        return await this.get(request);
      case Command.list:
        return await this.answer(request, encodeJson(this.store.keys));
      case Command.delete:
        this.store.delete(key);
        return await this.answer(request, this.store.laneOf(key).full ? STILL_CLOSING : NOTHING);
      case Command.readable:
        return await this.answer(request, this.readable(decodeJson(bytes, "a question")));
      case Command.deliver: {
        const { delivery, reply, rest } = decodeDelivery(bytes);
        // The front-end waits for the reply, nobody for a file to be closed.
        using closes = new DisposableStack();
        if (delivery.stores !== Stores.nothing) {
          closes.use(delivery.stores === Stores.fds ? this.putFds(key, rest, fds) : this.put(key, rest, fds));
          unused.move();
        }
        return await this.answer(request, this.deliver(key, delivery, reply, closes));
      }
      default:
        throw new VhostdError("protocol", `there is no command ${command}`);
    }
  }

  /** Takes the fds where it does not throw. @returns as Store.put */
  private put(key: string, bytes: Uint8Array, fds: readonly OwnedFd[]): Disposable {
    if (key === "") throw new VhostdError("protocol", "a record has no key");
    const { places, record } = decodePlaces(bytes);
    // A copy: what it is a part of is larger, and would stay with it.
    return this.store.put(key, places, { bytes: new Uint8Array(record), fds });
  }

  /** As `put`. */
  private putFds(key: string, bytes: Uint8Array, fds: readonly OwnedFd[]): Disposable {
    return this.store.putFds(key, decodePlaces(bytes).places, fds);
  }

  private async greet(request: KeeperMessage, bytes: Uint8Array): Promise<void> {
    const hello = decodeJson(bytes, "hello");
    const protocol = typeof hello === "object" && hello !== null && "protocol" in hello ? hello.protocol : undefined;
    if (protocol !== KEEPER_VERSION) {
      throw new VhostdError("notSupported", `the client speaks version ${protocol}, this keeper ${KEEPER_VERSION}`);
    }
    const identity = this.welcome();
    this.greeted = true;
    await this.answer(request, encodeJson(identity));
  }

  private async get(request: KeeperMessage): Promise<void> {
    const record = this.store.get(request.key);
    if (record === undefined) throw new VhostdError("notFound", `there is no record ${request.key}`);
    await this.answer(
      request,
      record.bytes,
      record.fds.map((fd) => fd.number),
    );
  }

  /**
   * What a daemon would do itself, and might die between the two.
   * @throws VhostdError notFound, protocol where nothing was done; io where the message does not lie there
   */
  private deliver(key: string, { place, take }: Delivery, reply: Uint8Array, closes: DisposableStack): Uint8Array {
    const fd = this.store.get(key)?.fds[place];
    if (fd === undefined || !isUnixStream(fd.number)) {
      throw new VhostdError("notFound", `there is no socket ${place} in a record ${key}`);
    }
    const lane = this.store.laneOf(key);
    // What comes out of the socket would wait there, too: the client has a lane of its own for it.
    if (lane.full) throw new VhostdError("notFound", `too many files of the record ${key} are still being closed`);
    // It has waited too long, or is dead: whoever goes on finds all as it was.
    if (this.socket.hungUp) throw new VhostdError("connectionLost", "the client is gone");
    if (take > TAKE_MAX) throw new VhostdError("protocol", `${take} bytes are to be taken, at most ${TAKE_MAX}`);
    if (take > 0) closes.use(takeBytes(fd.number, take, lane));
    return DELIVERED.encode({ sent: reply.length === 0 ? 0 : sendAtOnce(fd.number, reply) });
  }

  /** Sockets only: other files may keep waiting who asks. */
  private readable(asked: unknown): Uint8Array {
    if (!Array.isArray(asked)) throw new VhostdError("protocol", "what is asked for is no list");
    return Uint8Array.from(asked, (one) => {
      const [key, index] = Array.isArray(one) ? one : [];
      const fd = typeof key === "string" && typeof index === "number" ? this.store.get(key)?.fds[index] : undefined;
      const readable = fd === undefined ? undefined : isReadable(fd.number);
      return readable === undefined ? Readability.unknown : readable ? Readability.yes : Readability.no;
    });
  }

  private async answer(
    { id, command, key }: KeeperMessage,
    payload: Uint8Array = NOTHING,
    fds: readonly number[] = [],
    flags = 0,
  ): Promise<void> {
    for (const part of partsOf(payload, fds)) {
      const more = part.more ? HeaderFlag.more : 0;
      const message = { id, command, flags: HeaderFlag.reply | flags | more, key, payload: part.payload };
      await this.socket.send(encodeMessage(message), part.fds);
    }
  }
}
