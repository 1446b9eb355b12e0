import { VhostdError } from "../base/errors.ts";
import type { OwnedFd } from "../native/fd.ts";
import { MessageSocket } from "../native/message-socket.ts";
import { isReadable } from "../native/sys.ts";
import { IncomingRecord } from "./incoming-record.ts";
import {
  Command,
  decodeJson,
  decodeMessage,
  encodeJson,
  encodeMessage,
  encodeRefusal,
  HeaderFlag,
  KEEPER_FRAMING,
  KEEPER_VERSION,
  type KeeperMessage,
  partsOf,
  Readability,
} from "./messages.ts";
import type { Store } from "./store.ts";

const NOTHING = new Uint8Array(0);

/** What a keeper says of itself. */
export type KeeperIdentity = {
  readonly protocol: number;
  readonly version: string;
  readonly build: string;
};

/** One client of the store, from connect to hang-up. What it had begun to store and not ended leaves no trace. */
export class KeeperConnection implements Disposable {
  private readonly socket: MessageSocket;
  /** Parts of one record come one after the other. */
  private begun: IncomingRecord | undefined;
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
   * @throws VhostdError protocol where it breaks the protocol; what else its socket says
   */
  async run(): Promise<void> {
    for (;;) {
      using message = await this.socket.receive();
      if (message === undefined) return;
      const request = decodeMessage(message.header, message.body);
      if ((request.flags & HeaderFlag.reply) !== 0) throw new VhostdError("protocol", "a client sent an answer");
      try {
        await this.handle(request, message.fds);
      } catch (error) {
        if (!(error instanceof VhostdError) || error.code === "protocol" || this.socket.closed) throw error;
        await this.answer(request, encodeRefusal(error), [], HeaderFlag.error);
      }
    }
  }

  [Symbol.dispose](): void {
    this.begun?.[Symbol.dispose]();
    this.socket[Symbol.dispose]();
  }

  /** @param fds those that are taken are taken out */
  private async handle(request: KeeperMessage, fds: OwnedFd[]): Promise<void> {
    const { command, key, payload } = request;
    if (command === Command.hello) return await this.greet(request);
    if (!this.greeted) throw new VhostdError("protocol", `command ${command} came before hello`);
    if (this.begun !== undefined && command !== Command.put) {
      throw new VhostdError("protocol", `command ${command} came in the middle of ${this.begun.key}`);
    }
    switch (command) {
      case Command.put:
        return await this.put(request, fds);
      case Command.get:
        return await this.get(request);
      case Command.list:
        return await this.answer(request, encodeJson(this.store.keys));
      case Command.delete:
        this.store.delete(key);
        return await this.answer(request);
      case Command.readable:
        return await this.answer(request, this.readable(decodeJson(payload, "a question")));
      default:
        throw new VhostdError("protocol", `there is no command ${command}`);
    }
  }

  private async greet(request: KeeperMessage): Promise<void> {
    const hello = decodeJson(request.payload, "hello");
    const protocol = typeof hello === "object" && hello !== null && "protocol" in hello ? hello.protocol : undefined;
    if (protocol !== KEEPER_VERSION) {
      throw new VhostdError("notSupported", `the client speaks version ${protocol}, this keeper ${KEEPER_VERSION}`);
    }
    const identity = this.welcome();
    this.greeted = true;
    await this.answer(request, encodeJson(identity));
  }

  private async put(request: KeeperMessage, fds: OwnedFd[]): Promise<void> {
    const { key, payload, flags } = request;
    if (key === "") throw new VhostdError("protocol", "a record has no key");
    this.begun ??= new IncomingRecord(key, (size, count) => this.store.checkRecord(key, size, count));
    if (this.begun.key !== key)
      throw new VhostdError("protocol", `a part of ${key} came in the middle of ${this.begun.key}`);
    this.begun.add(payload, fds.splice(0));
    if ((flags & HeaderFlag.more) !== 0) return;
    const { begun } = this;
    this.begun = undefined;
    const record = begun.take();
    using unused = new DisposableStack();
    for (const fd of record.fds) unused.use(fd);
    this.store.put(key, record);
    unused.move();
    await this.answer(request);
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
