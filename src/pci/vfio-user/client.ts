import { Deadline } from "../../base/deadline.ts";
import { asError, SystemError, VhostdError } from "../../base/errors.ts";
import { CloseLane, type OwnedFd } from "../../native/fd.ts";
import { type Message, MessageSocket } from "../../native/message-socket.ts";
import { connectUnix, memfd, pread, pwrite } from "../../native/sys.ts";
import { encodeMessage, vfioUserFraming } from "../../vfio-user/framing.ts";
import { Command, type CommandNumber, commandName, HEADER, HeaderFlag } from "../../vfio-user/messages.ts";
import { type Capabilities, decodeVersion, encodeVersion, PROTOCOL_VERSION } from "../../vfio-user/version.ts";

/** What this client takes. The kernel carries at most 253 descriptors in a message. */
const CLIENT_CAPABILITIES: Capabilities = {
  maxMsgFds: 253,
  maxDataTransfer: 1 << 20,
  maxDmaMaps: 65535,
  pageSizes: 4096,
  kickFds: 1,
  queueStats: 1,
};

/** Milliseconds for an answer where the caller names no deadline. */
const REQUEST_TIMEOUT = 5000;
/** Requests without an answer; a server that is further behind does not answer at all. */
const OUTSTANDING_MAX = 8192;
/**
 * Each process that goes on with a connection has the next quarter of the ids to itself: answers to those before it may be
 * under way still.
 */
const TURNS = 4;
const IDS_A_TURN = 0x10000 / TURNS;
const TURN_SIZE = 4;
const EOPNOTSUPP = 95;

/** Plain data: what a successor on the same connection must know, beside the socket and the file of `turns`. */
export type ClientSnapshot = {
  readonly capabilities: Capabilities;
};

export interface RequestOptions {
  /** Borrowed until the request is sent. */
  readonly fds?: readonly number[];
  readonly deadline?: Deadline;
}

/** An answer whose id, command and error flag have been checked. Its descriptors are closed when it is disposed of. */
export type Reply = Pick<Message, "body" | "fds"> & Disposable;

interface Pending {
  readonly command: CommandNumber;
  resolve(reply: Reply): void;
  reject(error: Error): void;
}

/**
 * The client's end of one vfio-user connection. Several requests may be under way; they reach the server in the order
 * they were made, and answers are matched by message id. A server that breaks the protocol is hung up on.
 *
 * A kill leaves the connection as it is. Every request fits into one buffer of the socket, which takes all of it or nothing; an
 * answer is taken whole where the server has sent it in one piece, as long as one such buffer. What was asked and not answered is
 * dropped by the successor. A kill while an answer that came in pieces is being taken costs the connection: what the successor
 * reads is no message.
 */
export class VfioUserClient implements Disposable {
  /** Resolves with the reason when the server is gone or was hung up on; not when this side is done with it. */
  readonly lost: Promise<Error>;
  private end: Error | undefined;
  private resolveLost: (reason: Error) => void = () => {};
  private readonly socket: MessageSocket;
  private readonly pending = new Map<number, Pending>();
  /** Requests made so far. */
  private made = 0;

  private constructor(
    fd: OwnedFd,
    /** For messages to people: "vfio-user server of 0000:5a:00.1". */
    private readonly peer: string,
    private limits: Capabilities,
    /** Which process has the connection: four bytes of a file that outlives each. */
    private readonly turns: OwnedFd,
    private readonly turn: number,
  ) {
    const { maxDataTransfer, maxMsgFds } = CLIENT_CAPABILITIES;
    // Room for the fixed part of an answer in front of the data.
    this.socket = new MessageSocket(fd, vfioUserFraming({ maxBody: maxDataTransfer + 4096, maxFds: maxMsgFds }));
    this.lost = new Promise((resolve) => {
      this.resolveLost = resolve;
    });
    void this.receiveLoop();
  }

  /**
   * Connects and agrees on the version.
   * @throws VhostdError as connectUnix; protocol; timedOut
   */
  static async connect(path: string, peer: string, deadline: Deadline): Promise<VfioUserClient> {
    return VfioUserClient.over(connectUnix(path), peer, deadline);
  }

  /** The same over a socket that is connected. Takes the fd. */
  static async over(fd: OwnedFd, peer: string, deadline: Deadline): Promise<VfioUserClient> {
    using undo = new DisposableStack();
    undo.use(fd);
    const turns = memfd("vfio-user turns", TURN_SIZE);
    undo.move();
    const client = new VfioUserClient(fd, peer, CLIENT_CAPABILITIES, turns, 0);
    try {
      const proposal = encodeVersion({ ...PROTOCOL_VERSION, capabilities: CLIENT_CAPABILITIES });
      using reply = await client.request(Command.version, proposal, { deadline });
      const { major, minor, capabilities } = decodeVersion(reply.body);
      if (major !== PROTOCOL_VERSION.major || minor > PROTOCOL_VERSION.minor) {
        throw new VhostdError(
          "protocol",
          `${peer} speaks version ${major}.${minor}; ${PROTOCOL_VERSION.major}.${PROTOCOL_VERSION.minor} was proposed`,
        );
      }
      client.limits = capabilities;
      return client;
    } catch (error) {
      client.hangUp(asError(error));
      throw error;
    }
  }

  /**
   * Goes on where another process was. Nothing is sent. Takes the fds.
   * @param turns where that one has noted which one it was
   * @throws VhostdError invalid where nothing can be noted there
   */
  static revive(fd: OwnedFd, turns: OwnedFd, peer: string, { capabilities }: ClientSnapshot): VfioUserClient {
    using undo = new DisposableStack();
    undo.use(fd);
    undo.use(turns);
    // Before anything is sent: the record may be as old as the connection.
    const turn = takeTurn(turns.number, peer);
    undo.move();
    // Not that of the record, in which its front-end may have files that cannot be closed.
    return new VfioUserClient(fd.inLane(new CloseLane()), peer, capabilities, turns, turn);
  }

  /** What the server said it takes. */
  get capabilities(): Capabilities {
    return this.limits;
  }

  /** Why the connection ended; undefined while it stands. */
  get ended(): Error | undefined {
    return this.end;
  }

  /** Borrowed: the socket, and the file of its turns. */
  get fds(): { readonly socket: number; readonly turns: number } {
    return { socket: this.socket.fd, turns: this.turns.number };
  }

  snapshot(): ClientSnapshot {
    return { capabilities: this.limits };
  }

  /**
   * Sends a command and awaits its answer.
   * @throws SystemError with the server's errno; VhostdError timedOut, connectionLost, busy
   */
  async request(command: CommandNumber, body: Uint8Array, options: RequestOptions = {}): Promise<Reply> {
    const { fds = [], deadline = Deadline.after(REQUEST_TIMEOUT, `${commandName(command)} at ${this.peer}`) } = options;
    if (this.end !== undefined) throw this.connectionLost();
    if (fds.length > this.limits.maxMsgFds) {
      throw new VhostdError("notSupported", `${this.peer} takes ${this.limits.maxMsgFds} descriptors a message`);
    }
    const id = this.takeId();
    const answer = new Promise<Reply>((resolve, reject) => {
      this.pending.set(id, { command, resolve, reject });
    });
    let sent = false;
    this.socket.send(encodeMessage({ id, command, flags: 0 }, body), fds).then(
      () => {
        sent = true;
      },
      (error) => this.hangUp(asError(error)),
    );
    try {
      return await deadline.race(answer);
    } catch (error) {
      // The id stays taken: a late answer to it must not be taken for the answer to another request.
      answer.then((late) => late[Symbol.dispose]()).catch(() => {});
      // The borrowed descriptors end with this call; a message still queued would carry whatever has their numbers then.
      if (!sent) this.hangUp(asError(error));
      throw error;
    }
  }

  /** Ends the connection because the server is of no use any more; it lets go of everything it was given. */
  hangUp(reason: Error): void {
    if (this.end !== undefined) return;
    this.finish(reason);
    this.socket[Symbol.dispose]();
    this.resolveLost(reason);
  }

  /** Leaves the connection to whoever holds a duplicate of its fd. */
  abandon(): void {
    if (this.end !== undefined) return;
    this.finish(new VhostdError("cancelled", `the connection to ${this.peer} was handed over`));
    this.socket.abandon()[Symbol.dispose]();
  }

  [Symbol.dispose](): void {
    if (this.end !== undefined) return;
    this.finish(new VhostdError("cancelled", `the connection to ${this.peer} was closed by this side`));
    this.socket[Symbol.dispose]();
  }

  private finish(reason: Error): void {
    this.end = reason;
    this.turns[Symbol.dispose]();
    for (const { reject } of this.pending.values()) reject(this.connectionLost());
    this.pending.clear();
  }

  private connectionLost(): VhostdError {
    return new VhostdError("connectionLost", `the connection to ${this.peer} has ended`, { cause: this.end });
  }

  private takeId(): number {
    if (this.pending.size >= OUTSTANDING_MAX) {
      throw new VhostdError("busy", `${this.peer} owes ${this.pending.size} answers; at most ${OUTSTANDING_MAX}`);
    }
    const first = (this.turn % TURNS) * IDS_A_TURN;
    for (;;) {
      const id = first + (this.made++ % IDS_A_TURN);
      if (!this.pending.has(id)) return id;
    }
  }

  private async receiveLoop(): Promise<void> {
    try {
      while (this.end === undefined) {
        const message = await this.socket.receive();
        if (message === undefined) throw new VhostdError("connectionLost", `${this.peer} hung up`);
        await this.accept(message);
      }
    } catch (error) {
      this.hangUp(asError(error));
    }
  }

  /** @throws VhostdError protocol where the message fits no request */
  private async accept(message: Message): Promise<void> {
    const header = HEADER.read(message.header);
    const type = header.flags & HeaderFlag.typeMask;
    if (type !== HeaderFlag.reply) {
      message[Symbol.dispose]();
      if (type !== 0) throw new VhostdError("protocol", `${this.peer} sent a message of type ${type}`);
      return this.refuseCommand(header);
    }
    const entry = this.pending.get(header.id);
    if (entry === undefined) {
      message[Symbol.dispose]();
      if (this.turn > 0) return;
      throw new VhostdError("protocol", `${this.peer} answered message ${header.id}, which was not asked`);
    }
    if (header.command !== entry.command) {
      message[Symbol.dispose]();
      const seen = commandName(header.command);
      throw new VhostdError("protocol", `${this.peer} answered ${seen} where ${commandName(entry.command)} was asked`);
    }
    this.pending.delete(header.id);
    if ((header.flags & HeaderFlag.error) !== 0) {
      message[Symbol.dispose]();
      entry.reject(new SystemError(`${commandName(entry.command)} at ${this.peer}`, errnoOf(header.error)));
    } else {
      entry.resolve(message);
    }
  }

  /** A server asks to have memory read or written where it was given none; here it is always given a descriptor. */
  private async refuseCommand(header: { id: number; command: number; flags: number }): Promise<void> {
    if ((header.flags & HeaderFlag.noReply) !== 0) return;
    const flags = HeaderFlag.reply | HeaderFlag.error;
    await this.socket.send(encodeMessage({ id: header.id, command: header.command, flags, error: EOPNOTSUPP }));
  }
}

/** The error field is optional and may be anything: EIO stands for what is no errno. */
function errnoOf(value: number): number {
  return value >= 1 && value < 4096 ? value : 5;
}

/** @throws VhostdError invalid */
function takeTurn(turns: number, peer: string): number {
  const bytes = new Uint8Array(TURN_SIZE);
  const view = new DataView(bytes.buffer);
  if (pread(turns, bytes, 0) !== TURN_SIZE) {
    throw new VhostdError("invalid", `the stored connection to ${peer} does not say whose turn it is`);
  }
  const turn = view.getUint32(0, true) + 1;
  view.setUint32(0, turn, true);
  pwrite(turns, bytes, 0);
  return turn;
}
