import { Deadline } from "../base/deadline.ts";
import { asError, SystemError, VhostdError } from "../base/errors.ts";
import type { Json } from "../base/json.ts";
import { OperationQueue } from "../base/operation-queue.ts";
import { CloseLane, fileIdentity, type OwnedFd } from "../native/fd.ts";
import { MessageSocket } from "../native/message-socket.ts";
import { connectUnix } from "../native/sys.ts";
import type { KeeperIdentity } from "./keeper-connection.ts";
import {
  Command,
  type CommandName,
  checkKey,
  DELIVERED,
  DELIVERY,
  decodeJson,
  decodeMessage,
  decodeRefusal,
  encodeJson,
  encodeMessage,
  encodePlaces,
  HeaderFlag,
  KEEPER_FRAMING,
  KEEPER_VERSION,
  NEW_FD,
  partsOf,
  Readability,
  Stores,
} from "./messages.ts";

/** Milliseconds for an answer. */
const ANSWER_TIMEOUT = 5_000;
/** Milliseconds between two tries to be served, while the one before is still cleaned up after. */
const BUSY_INTERVAL = 20;
/** What another try may not meet any more. */
const PASSING: ReadonlySet<string> = new Set(["busy", "connectionLost"]);
const EAGAIN = 11;
const NOTHING = new Uint8Array(0);

/** A record beside its fds by name, as it is stored. */
export interface Kept {
  readonly record: Json;
  /** Borrowed. */
  readonly fds: ReadonlyMap<string, number>;
}

interface Answer {
  readonly bytes: Uint8Array;
  /** The asker's. */
  readonly fds: OwnedFd[];
}

/** What is stored beside something else. */
export interface Storing {
  /** The record as it is now. */
  readonly take: () => Kept;
  /** The one fd by which it differs from what was stored last: its name, and the fd in its place, borrowed. */
  readonly replacement?: readonly [name: string, fd: number];
}

/** A record as it is stored. */
interface Last {
  readonly names: readonly string[];
  /** Known where it is known to be stored. */
  files?: readonly number[];
}

/** A record as it is sent. */
interface Encoded {
  /** Places, and the record where it is not as it was. */
  readonly bytes: Uint8Array;
  readonly stores: number;
  /** The fds that the keeper does not have. */
  readonly added: readonly number[];
  /** It is known to be stored. */
  stored(): void;
}

interface Asked {
  readonly command: CommandName;
  readonly parts: Uint8Array[];
  readonly fds: OwnedFd[];
  readonly reply: PromiseWithResolvers<Answer>;
}

/**
 * The daemon's end of the connection to its keeper. Requests are handled in the order in which they are made; several may be
 * under way.
 */
export class KeeperClient implements Disposable {
  /** Resolves with the reason when the keeper is gone; not when this side is done with it. */
  readonly lost: Promise<Error>;
  private resolveLost: (reason: Error) => void = () => {};
  private readonly asked = new Map<number, Asked>();
  private readonly sending = new OperationQueue();
  /** By key: the last put. */
  private readonly last = new Map<string, Last>();
  /** Keys of which the keeper takes no record for now: it would only have more fds to close. */
  private readonly stillClosing = new Set<string>();
  private nextId = 1;
  private end: Error | undefined;
  private who: KeeperIdentity | undefined;

  private constructor(private readonly socket: MessageSocket) {
    this.lost = new Promise((resolve) => {
      this.resolveLost = resolve;
    });
    void this.receive();
  }

  /**
   * Waits while somebody else is served, and while there are too many who wait.
   * @throws SystemError where nobody listens; VhostdError busy, notSupported, timedOut
   */
  static async connect(path: string, deadline: Deadline): Promise<KeeperClient> {
    let why: Error | undefined;
    for (;;) {
      try {
        return await KeeperClient.tryToConnect(path, deadline);
      } catch (error) {
        const mayPass = error instanceof VhostdError && (PASSING.has(error.code) || error.number === EAGAIN);
        // That there was no time for another try says nothing.
        if (!mayPass) throw deadline.expired ? (why ?? error) : error;
        why = error;
      }
      if (deadline.expired) throw why;
      await Bun.sleep(Math.min(BUSY_INTERVAL, deadline.remaining));
    }
  }

  private static async tryToConnect(path: string, deadline: Deadline): Promise<KeeperClient> {
    const client = new KeeperClient(new MessageSocket(connectUnix(path), KEEPER_FRAMING));
    try {
      const { bytes } = await client.ask("hello", "", encodeJson({ protocol: KEEPER_VERSION }), [], deadline);
      client.who = decodeJson(bytes, "what the keeper says of itself") as KeeperIdentity;
      return client;
    } catch (error) {
      client[Symbol.dispose]();
      throw error;
    }
  }

  get identity(): KeeperIdentity {
    if (this.who === undefined) throw new VhostdError("invalid", "the keeper has not said who it is");
    return this.who;
  }

  /** Why nothing can be asked any more; undefined while all is well. */
  get ended(): Error | undefined {
    return this.end;
  }

  /**
   * @throws VhostdError keeperStore: nothing is stored then. After a delete it may be taken; connectionLost, timedOut: it may
   *   be stored or not
   */
  async put(key: string, take: () => Kept): Promise<void> {
    const { bytes, added, stored } = this.encode(key, take);
    await this.ask("put", key, bytes, added);
    stored();
  }

  /** The fds are the caller's. @throws VhostdError protocol where what is stored is no record */
  async get(key: string): Promise<{ record: Json; fds: Map<string, OwnedFd> } | undefined> {
    const answer = await this.ask("get", key).catch((error) => {
      if (error instanceof VhostdError && error.code === "notFound") return undefined;
      throw error;
    });
    if (answer === undefined) return undefined;
    using unused = new DisposableStack();
    for (const fd of answer.fds) unused.use(fd);
    const stored = decodeJson(answer.bytes, `the record ${key}`) as { names?: unknown; record?: Json } | null;
    const names = stored?.names;
    const fits = Array.isArray(names) && names.length === answer.fds.length && new Set(names).size === names.length;
    if (!fits || stored?.record === undefined) {
      throw new VhostdError("protocol", `the record ${key} does not fit its ${answer.fds.length} fds`);
    }
    unused.move();
    return { record: stored.record, fds: new Map(answer.fds.map((fd, index) => [String(names[index]), fd])) };
  }

  /** @throws VhostdError */
  async list(): Promise<string[]> {
    const { bytes } = await this.ask("list");
    const keys = decodeJson(bytes, "the list of keys");
    if (!Array.isArray(keys)) throw new VhostdError("protocol", "the list of keys is none");
    return keys.map(String);
  }

  /** @throws VhostdError */
  async delete(key: string): Promise<void> {
    this.last.delete(key);
    const { bytes } = await this.ask("delete", key);
    if (bytes.length > 0) this.stillClosing.add(key);
    else this.stillClosing.delete(key);
  }

  /**
   * Whether something waits to be read from sockets of stored records; undefined where nobody can say.
   * @param places key of the record, and which of its fds, as they were stored
   * @throws VhostdError
   */
  async readable(places: readonly (readonly [key: string, fd: number])[]): Promise<(boolean | undefined)[]> {
    const { bytes } = await this.ask("readable", "", encodeJson(places));
    return places.map((_, index) => {
      const found = bytes[index] ?? Readability.unknown;
      return found === Readability.unknown ? undefined : found === Readability.yes;
    });
  }

  /**
   * Takes bytes out of a socket of a record and sends others on it, both or nothing, whatever becomes of this process.
   * @param place of the socket among the fds, as they were stored
   * @param storing what is stored before
   * @returns bytes that were sent; the socket took no more
   * @throws VhostdError as `put` does; notFound where there is no such socket, nothing was done then but for the record;
   *   connectionLost, timedOut: it may be done or not
   */
  async deliver(key: string, place: number, take: number, reply: Uint8Array, storing?: Storing): Promise<number> {
    const record = storing && (this.encodeReplacement(key, storing) ?? this.encode(key, storing.take));
    const stores = record?.stores ?? Stores.nothing;
    const delivery = DELIVERY.encode({ place, take, replySize: reply.length, stores });
    const payload = Buffer.concat([delivery, reply, record?.bytes ?? NOTHING]);
    const { bytes } = await this.ask("deliver", key, payload, record?.added);
    record?.stored();
    return DELIVERED.read(bytes).sent;
  }

  [Symbol.dispose](): void {
    if (this.end !== undefined) return;
    this.end = new VhostdError("cancelled", "the connection to the keeper was closed by this side");
    this.letGo();
  }

  /** Of the fds only those are sent that the last record of that key did not have. @throws VhostdError keeperStore */
  private encode(key: string, take: () => Kept): Encoded {
    if (this.stillClosing.has(key)) {
      throw new VhostdError("keeperStore", `the keeper still closes too many files of earlier records ${key}`);
    }
    const { record, fds } = take();
    const numbers = [...fds.values()];
    const files = numbers.map(fileIdentity);
    const places = placesIn(this.last.get(key)?.files ?? [], files);
    const names = [...fds.keys()];
    return {
      bytes: encodePlaces(places, encodeJson({ names, record })),
      stores: Stores.record,
      added: numbers.filter((_, index) => places[index] === NEW_FD),
      stored: this.expect(key, names, files),
    };
  }

  /** undefined where it is not known what the keeper has. */
  private encodeReplacement(key: string, { replacement }: Storing): Encoded | undefined {
    const { names = [], files } = this.last.get(key) ?? {};
    const [name = "", fd = -1] = replacement ?? [];
    const at = names.indexOf(name);
    if (files === undefined || at < 0) return undefined;
    return {
      bytes: encodePlaces(
        files.map((_, place) => (place === at ? NEW_FD : place)),
        NOTHING,
      ),
      stores: Stores.fds,
      added: [fd],
      stored: this.expect(key, names, files.with(at, fileIdentity(fd))),
    };
  }

  /** @returns to be called when it is stored */
  private expect(key: string, names: readonly string[], files: readonly number[]): () => void {
    const put: Last = { names };
    this.last.set(key, put);
    return () => {
      put.files = files;
    };
  }

  private async ask(
    command: CommandName,
    key = "",
    payload: Uint8Array = NOTHING,
    fds: readonly number[] = [],
    deadline = Deadline.after(ANSWER_TIMEOUT, `${command} ${key} at the keeper`),
  ): Promise<Answer> {
    if (this.end !== undefined) throw this.lostError();
    checkKey(key);
    const id = this.nextId;
    this.nextId = (id % 0xffff_ffff) + 1;
    const asked: Asked = { command, parts: [], fds: [], reply: Promise.withResolvers() };
    this.asked.set(id, asked);
    const sent = this.sending.run(() => this.send(id, asked, key, partsOf(payload, fds)));
    sent.catch((error) => asked.reply.reject(error));
    try {
      return await deadline.race(asked.reply.promise);
    } catch (error) {
      // It may have come at the last moment.
      asked.reply.promise.then(({ fds }) => closeAll(fds)).catch(() => {});
      // Borrowed fds that are not sent yet would be other files.
      if (error instanceof VhostdError && error.code === "timedOut") this.finish(error);
      throw error;
    } finally {
      this.asked.delete(id);
      await sent.catch(() => {});
    }
  }

  /** The parts of a request come one after the other. @throws what the socket does; the connection goes on where nothing went out */
  private async send(
    id: number,
    { command }: Asked,
    key: string,
    parts: ReturnType<typeof partsOf<number>>,
  ): Promise<void> {
    for (const [index, { payload, fds, more }] of parts.entries()) {
      const message = { id, command: Command[command], flags: more ? HeaderFlag.more : 0, key, payload };
      try {
        await this.socket.send(encodeMessage(message), fds);
      } catch (error) {
        if (index > 0 || !(error instanceof SystemError)) this.finish(asError(error));
        throw error;
      }
    }
  }

  private async receive(): Promise<void> {
    try {
      for (;;) {
        using message = await this.socket.receive();
        if (message === undefined) throw new VhostdError("connectionLost", "the keeper hung up");
        this.accept(message.header, message.body, message.fds);
      }
    } catch (error) {
      this.finish(asError(error));
    }
  }

  /** @throws VhostdError protocol where it is no answer to anything */
  private accept(header: Uint8Array, body: Uint8Array, fds: OwnedFd[]): void {
    const { id, command, flags, payload } = decodeMessage(header, body);
    const asked = this.asked.get(id);
    if ((flags & HeaderFlag.reply) === 0 || asked === undefined || Command[asked.command] !== command) {
      throw new VhostdError("protocol", `the keeper answered ${id}, command ${command}, which was not asked`);
    }
    if (fds.length > 0 && asked.command !== "get")
      throw new VhostdError("protocol", `${asked.command} was answered with fds`);
    if ((flags & HeaderFlag.error) !== 0) {
      // What came of the answer before is of no use.
      this.asked.delete(id);
      closeAll(asked.fds);
      asked.reply.reject(decodeRefusal(payload));
      return;
    }
    asked.parts.push(payload);
    if (fds.length > 0) {
      // Those of one record: they do not hold up others.
      const lane = asked.fds[0]?.lane ?? new CloseLane();
      asked.fds.push(...fds.splice(0).map((fd) => fd.inLane(lane)));
    }
    if ((flags & HeaderFlag.more) !== 0) return;
    this.asked.delete(id);
    asked.reply.resolve({ bytes: Buffer.concat(asked.parts), fds: asked.fds });
  }

  /** Not by this side's will. */
  private finish(reason: Error): void {
    if (this.end !== undefined) return;
    this.end = reason;
    this.letGo();
    this.resolveLost(reason);
  }

  private letGo(): void {
    this.socket[Symbol.dispose]();
    for (const { reply, fds } of this.asked.values()) {
      closeAll(fds);
      reply.reject(this.lostError());
    }
    this.asked.clear();
  }

  private lostError(): VhostdError {
    return new VhostdError("connectionLost", `the keeper is not there: ${this.end?.message}`, { cause: this.end });
  }
}

/** Of each file in the earlier ones, or NEW_FD; mostly all are where they were. */
function placesIn(earlier: readonly number[], files: readonly number[]): number[] {
  const moved = new Map<number, number>();
  for (let place = 0; place < earlier.length; place++) {
    if (earlier[place] !== files[place]) moved.set(earlier[place]!, place);
  }
  return files.map((file, at) => {
    if (earlier[at] === file) return at;
    const place = moved.get(file) ?? NEW_FD;
    moved.delete(file);
    return place;
  });
}

function closeAll(fds: OwnedFd[]): void {
  for (const fd of fds.splice(0)) fd[Symbol.dispose]();
}
