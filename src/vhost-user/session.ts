import { Deadline } from "../base/deadline.ts";
import { asError, sentence, VhostdError } from "../base/errors.ts";
import type { Json } from "../base/json.ts";
import type { Logger } from "../base/log.ts";
import { OperationQueue } from "../base/operation-queue.ts";
import type { OwnedFd } from "../native/fd.ts";
import { peerCredentials } from "../native/sys.ts";
import { Backend } from "./backend.ts";
import { Connection, encodeReply, type PeekedIncoming } from "./connection.ts";
import { HEADER, ProtocolFeature, U64 } from "./messages.ts";
import { parseSessionRecord, type SessionRecord } from "./record.ts";
import { watchRecord } from "./record-change.ts";
import { MemoryRefusal, MinorRefusal, Refusal } from "./refusal.ts";
import { type Answer, checkMessage, type RequestTable, requestTable, rowOf } from "./requests.ts";
import { eventfdsOf } from "./rings.ts";
import { SessionPage } from "./session-page.ts";
import { FRESH_RECORD } from "./snapshot.ts";
import { featuresOf, type StateKind } from "./state.ts";
import type { RecordChange, RingEventfds, SessionTarget } from "./target.ts";

export interface SessionOptions {
  readonly log: Logger;
  /**
   * Without STATUS nothing says that all rings are there: the function is started when no message has come for so
   * long, and then it learns of rings that were disabled. Milliseconds; 50 unless said.
   */
  readonly quietPeriod?: number;
  /** For a class's handler of a message; the session ends where it takes longer. Milliseconds; 5 s unless said. */
  readonly handlerTimeout?: number;
}

/**
 * Why a session ended. `error` is missing where the front-end hung up or `close` was called, but for a front-end that hung
 * up because its memory was refused.
 */
export interface SessionEnd {
  readonly reason: string;
  readonly error?: Error;
}

/** What people see of a session. */
export interface SessionStatus {
  readonly state: StateKind;
  /** Acknowledged by the front-end; 0 before. */
  readonly features: bigint;
  readonly protocolFeatures: bigint;
  /** Device status (VIRTIO 1.2, 2.1). */
  readonly status: number;
  /** Bytes of guest memory. */
  readonly memory: number;
  readonly rings: readonly {
    readonly index: number;
    readonly size: number;
    readonly started: boolean;
    readonly enabled: boolean;
  }[];
}

/** A message that was acted on. */
interface Done {
  readonly answer: Answer;
  readonly change: RecordChange;
}

interface Saved {
  readonly record: SessionRecord;
  takeFd(name: string): OwnedFd | undefined;
  takePage(): SessionPage;
}

const FRESH: Saved = { record: FRESH_RECORD, takeFd: () => undefined, takePage: () => SessionPage.create() };
const ACCEPTED = U64.encode({ value: 0n });
const REFUSED = U64.encode({ value: 1n });

/**
 * For a front-end that may wait for an answer that does not come, to look at the pages that were marked: one that does wait
 * never looks, and its guest stands still meanwhile. Milliseconds.
 */
const LOOK_PATIENCE = 10_000;
/** Milliseconds between two times that it is seen whether it has. */
const LOOK_INTERVAL = 20;

/** Processes that may die with a session before it is not gone on with. */
const DEATHS_MAX = 3;
/** For a session to be taken up and its first message to be handled, before the next one has its turn. Milliseconds. */
const TURN_PATIENCE = 15_000;
/** Sessions that may be why an earlier process has died: one after the other, so that none is blamed for what another did. */
const suspects = new OperationQueue();

/** One vhost-user connection of one VF, from connect to hang-up. */
export class Session {
  /** Process id of the front-end. */
  readonly peer: number;
  private readonly connection: Connection;
  private readonly backend: Backend;
  private readonly table: RequestTable;
  private readonly page: SessionPage;
  private readonly log: Logger;
  private readonly quietPeriod: number;
  /** Messages and what is done after the quiet period: one after the other. */
  private readonly operations = new OperationQueue();
  private readonly ended = Promise.withResolvers<SessionEnd>();
  private quiet: ReturnType<typeof setTimeout> | undefined;
  private abandoned = false;
  private answering: Promise<void> = Promise.resolve();

  /**
   * Takes ownership of the connection.
   * @throws VhostdError where `saved` does not fit the target; the fds are the caller's then
   */
  constructor(fd: OwnedFd, target: SessionTarget, options: SessionOptions, saved: Saved = FRESH) {
    this.peer = peerCredentials(fd.number).pid;
    this.log = options.log;
    this.quietPeriod = options.quietPeriod ?? 50;
    this.table = requestTable(target.deviceClass, options.handlerTimeout);
    using undo = new DisposableStack();
    this.page = undo.use(saved.takePage());
    this.backend = new Backend(target, options.log, saved.record, saved.takeFd);
    undo.move();
    this.connection = new Connection(fd, {
      payloadLimit: (request) => rowOf(this.table, request).payload[1],
      mayCarryFds: (request) => rowOf(this.table, request).fds[1] > 0,
      beforeTaking: () => this.page.noteTaken(),
    });
    this.backend.mayRepeat = saved !== FRESH;
    target.onConfigChange(() => this.backend.configChanged());
    target.onTrackingLost((error) => this.unlessEnded(() => this.loseTracking(error)));
  }

  /**
   * Goes on where `snapshot` was taken, when it is run. A message that is still in the socket may have been handled by the
   * process before, as a whole or in part: it is handled once more.
   * @param fds owned by the session from here on, also when this throws
   * @throws VhostdError where record and fds do not fit together or not the target
   */
  static revive(
    target: SessionTarget,
    data: Json,
    fds: ReadonlyMap<string, OwnedFd>,
    options: SessionOptions,
  ): Session {
    const unused = new Map(fds);
    const takeFd = (name: string) => {
      const fd = unused.get(name);
      unused.delete(name);
      return fd;
    };
    try {
      const record = parseSessionRecord(data);
      const connection = takeFd("connection");
      if (connection === undefined) throw new VhostdError("invalid", "the stored session lacks the fd connection");
      const session = new Session(connection, target, options, {
        record,
        takeFd,
        takePage: () => SessionPage.revive(takeFd("page")),
      });
      for (const fd of unused.values()) fd[Symbol.dispose]();
      return session;
    } catch (error) {
      for (const fd of fds.values()) fd[Symbol.dispose]();
      throw error;
    }
  }

  /**
   * Serves the front-end until the session ends, for whatever reason. Never rejects. When it resolves the function is
   * reset, guest memory unmapped and every fd closed. It does not settle after `abandon`: that is no end.
   * @param before done before the first message is handled; the session ends with what it throws. It is one of the session's
   * operations: `checkpoint` in it would wait for itself
   */
  async run(before: () => Promise<void> = async () => {}): Promise<SessionEnd> {
    const end = await Promise.race([this.serve(before), this.ended.promise]);
    clearTimeout(this.quiet);
    if (this.abandoned) return await new Promise<never>(() => {});
    // Behind the operation under way: a function is not reset in the middle of its start.
    await this.operations.run(() => this.finish(end));
    return end;
  }

  /** Ends the session; `run` resolves when all is undone. */
  close(reason: string): void {
    this.ended.resolve({ reason });
  }

  /** The function says that it cannot go on: the front-end reads NEEDS_RESET and is told to look. */
  needsReset(reason: string): void {
    this.log.error(`the device needs a reset: ${reason}`);
    this.backend.needsReset();
  }

  /** Has the target's record written anew, between two messages. Nothing happens after the end. */
  async checkpoint(): Promise<void> {
    await this.operations.run(async () => {
      if (!this.isOver) await this.backend.target.checkpoint();
    });
  }

  /**
   * Plain data beside the fds by name, borrowed. The first is "connection": whether it is readable says that a front-end
   * waits. @throws VhostdError connectionLost after the end
   */
  snapshot(): { data: Json; fds: ReadonlyMap<string, number> } {
    const { record, fds } = this.backend.snapshot();
    return { data: record, fds: new Map([["connection", this.connection.fd], ["page", this.page.fd], ...fds]) };
  }

  /** Of the rings that the front-end has started, borrowed, by queue. */
  get eventfds(): ReadonlyMap<number, RingEventfds> {
    return eventfdsOf(this.backend.rings.filter((ring) => ring.started));
  }

  /**
   * Lets go of everything of this process and touches neither function nor front-end: both go on for whoever holds
   * duplicates of the fds. An answer that is being sent is sent.
   */
  async abandon(): Promise<void> {
    this.abandoned = true;
    clearTimeout(this.quiet);
    await Promise.allSettled([this.answering]);
    this.connection.abandon()[Symbol.dispose]();
    this.page[Symbol.dispose]();
    await this.backend.abandon();
  }

  /** The function is to be told something: in a quiet moment, where this process lives that long. */
  get isBehind(): boolean {
    return this.backend.isBehind;
  }

  /** Why memory of the guest was refused, where the function has not run since. */
  get refusedMemory(): Error | undefined {
    return this.backend.refusedMemory;
  }

  /** A VMM in migration has yet to look at what the function writes, or at the pages that are marked in its place. */
  get owesPages(): boolean {
    const { state, logging } = this.backend;
    if (state.kind === "closed") return false;
    return logging.loss !== undefined || (logging.isOn && state.kind === "running");
  }

  /** The front-end is told of changes of the configuration space. */
  get hearsOfChanges(): boolean {
    return this.backend.canTellChanges;
  }

  get status(): SessionStatus {
    const { state, protocolFeatures, status, memory, rings } = this.backend;
    return {
      state: state.kind,
      features: featuresOf(state),
      protocolFeatures,
      status,
      memory: memory.list.reduce((sum, { range }) => sum + range.size, 0),
      rings: rings
        .filter((ring) => ring.size > 0)
        .map(({ index, size, started, enabled }) => ({ index, size, started, enabled })),
    };
  }

  private async serve(before: () => Promise<void>): Promise<SessionEnd> {
    try {
      const takeUp = () => this.takeUp(before);
      const doubt = await (this.page.attempts > 0 ? inTurn(takeUp) : takeUp());
      if (doubt !== undefined) await this.endInDoubt(doubt);
      while (await this.handleNext()) {}
      return this.hungUp();
    } catch (error) {
      const isHangUp = error instanceof VhostdError && error.code === "connectionLost";
      return failure((isHangUp ? this.refusedMemory : undefined) ?? error);
    }
  }

  /** After an earlier process also the first message is handled, where one waits. @returns as `begin` */
  private async takeUp(before: () => Promise<void>): Promise<string | undefined> {
    const doubt = await this.operations.run(() => this.begin(before));
    this.awaitQuiet();
    if (doubt !== undefined || this.isOver || this.page.attempts === 0) return doubt;
    if (this.connection.first(1).length > 0) await this.handleNext();
    else this.page.clear();
    return undefined;
  }

  /** False: the front-end has hung up. */
  private async handleNext(): Promise<boolean> {
    using message = await this.connection.peek();
    if (message === undefined) return false;
    await this.operations.run(() => this.handle(message));
    this.awaitQuiet();
    return true;
  }

  /**
   * Whoever comes after us finds the connection; what an earlier process has left off is gone on with.
   * @returns why the session is to end nevertheless
   */
  private async begin(before: () => Promise<void>): Promise<string | undefined> {
    if (this.isOver) return undefined;
    const { backend, page } = this;
    if (!backend.mayRepeat) await backend.target.checkpoint();
    else page.noteAttempt();
    const doubt = this.doubt();
    // What an earlier process was at is finished.
    if (doubt === undefined && page.note.stage !== "none") page.clear();
    await before();
    if (doubt === undefined || page.note.stage !== "none") await backend.goOn();
    // A start may be what the others have died of.
    else await backend.followLogging();
    return doubt;
  }

  /**
   * A front-end that would be answered twice, or never, is hung up on, so that it connects anew; before that, one in
   * migration is to see what the function wrote.
   */
  private async endInDoubt(doubt: string): Promise<void> {
    if (this.isOver) return;
    const fix = "none is needed, the VMM connects anew; where it happens again, report it";
    const error = new VhostdError("io", doubt, { fix });
    const { logging } = this.backend;
    if (logging.isOn) await this.operations.run(() => this.loseTracking(error));
    if (logging.loss !== undefined) {
      const deadline = Deadline.after(LOOK_PATIENCE, "front-end that looks into its dirty log");
      while (!this.isOver && !this.connection.hungUp && !this.backend.pagesSeen && !deadline.expired) {
        await Bun.sleep(LOOK_INTERVAL);
      }
    }
    throw error;
  }

  /** What an earlier process was at when it died, where going on is not safe; undefined where it is. */
  private doubt(): string | undefined {
    const { note, attempts } = this.page;
    if (note.stage === "taken") return "the daemon was killed while it handled a message that had come in pieces";
    if (note.stage === "answering" && this.connection.startsWith(note.bytes)) {
      return `the daemon was killed while it answered ${this.nameOf(note.bytes)}: whether it has is not known`;
    }
    const waiting = this.connection.first(HEADER.size);
    // It would kill the next ones, too, and end the service of all others.
    if (note.stage !== "none" || attempts < DEATHS_MAX || waiting.length === 0) return undefined;
    return `the daemon has died ${attempts} times while it took up this session or handled ${this.nameOf(waiting)}`;
  }

  private nameOf(message: Uint8Array): string {
    if (message.length < HEADER.size) return "a message that is not whole";
    const { request } = HEADER.read(message);
    return this.table.get(request)?.name ?? `request ${request}`;
  }

  private get isOver(): boolean {
    return this.abandoned || this.backend.state.kind === "closed";
  }

  private hungUp(): SessionEnd {
    if (this.refusedMemory !== undefined) return failure(this.refusedMemory);
    return { reason: "the front-end closed the connection" };
  }

  /** Whoever comes after us finds the message in the socket until it is done with. */
  private async handle(message: PeekedIncoming): Promise<void> {
    if (this.isOver) return;
    const done = await this.act(message);
    if (this.abandoned) return;
    this.answering = this.finishMessage(message, done);
    await this.answering;
  }

  private async act(message: PeekedIncoming): Promise<Done> {
    const row = rowOf(this.table, message.request);
    checkMessage(row, message, this.backend);
    const changed = watchRecord(row, message.payload, this.backend);
    let answer: Answer;
    try {
      answer = await row.handle(this.backend, message.payload, message.fds);
    } catch (error) {
      const told = this.awaitsReply(message);
      if (!(error instanceof Refusal) || !(told || error instanceof MinorRefusal)) throw error;
      this.backend.chatter.warn(`${row.name} was refused: ${sentence(error)}`);
      // A guest that runs does without memory that it is given now.
      const isNeeded = error instanceof MemoryRefusal && this.backend.state.kind !== "running";
      if (isNeeded) this.backend.refusedMemory = error;
      answer = told ? REFUSED : undefined;
      // Nothing has changed.
      if (error instanceof MinorRefusal) return { answer, change: "nothing" };
    }
    const change = changed();
    if (change === "all") await this.backend.followLogging();
    return { answer: answer ?? (this.awaitsReply(message) ? ACCEPTED : undefined), change };
  }

  /** The record is written before the answer: whoever comes after us finds what the front-end was told. */
  private async finishMessage(message: PeekedIncoming, { answer, change }: Done): Promise<void> {
    const { target } = this.backend;
    const deliverable = answer !== undefined && message.left && target.deliver !== undefined;
    if (!deliverable || !(await this.deliver(message, answer, change))) {
      if (change !== "nothing" && !deliverable) await target.checkpoint();
      await this.finishAlone(message, answer);
    }
    this.page.clear();
    this.backend.mayRepeat = false;
  }

  private async finishAlone(message: PeekedIncoming, answer: Answer): Promise<void> {
    if (answer !== undefined) {
      if (message.left) this.page.noteAnswering(message.header, message.payload);
      await this.connection.send(encodeReply(message.request, answer));
    }
    message.finish();
  }

  /** Has the keeper do it. @returns whether all is done */
  private async deliver(message: PeekedIncoming, answer: Uint8Array, change: RecordChange): Promise<boolean> {
    const { header, payload } = message;
    const reply = encodeReply(message.request, answer);
    const delivery = { take: header.length + payload.length, reply };
    const delivered = await this.backend.target.deliver?.(delivery, change);
    if (delivered?.kind === "taken") {
      if (delivered.sent < reply.length) await this.sendRest(reply.subarray(delivered.sent));
      return true;
    }
    if (delivered?.kind === "unknown" && !this.connection.startsWith(Buffer.concat([header, payload]))) {
      throw new VhostdError("io", "the keeper has gone while it answered: whether it has is not known");
    }
    return false;
  }

  /** The message is not in the socket any more. */
  private async sendRest(bytes: Uint8Array): Promise<void> {
    this.page.noteTaken();
    await this.connection.send(bytes);
  }

  private awaitsReply(message: PeekedIncoming): boolean {
    return message.needReply && this.backend.has(ProtocolFeature.REPLY_ACK);
  }

  /** Begins the quiet period anew where something is done after it. */
  private awaitQuiet(): void {
    clearTimeout(this.quiet);
    if (this.isOver || !this.backend.awaitsQuiet) return;
    this.quiet = setTimeout(() => this.unlessEnded(() => this.catchUp()), this.quietPeriod);
  }

  private async catchUp(): Promise<void> {
    if (await this.backend.catchUp()) {
      await this.backend.followLogging();
      await this.backend.target.checkpoint();
    }
    // A start may leave rings to be disabled, and a front-end may not have seen yet what was marked.
    this.awaitQuiet();
  }

  private async loseTracking(error: Error): Promise<void> {
    if (!this.backend.logging.isOn) return;
    await this.backend.loseTracking(error);
    await this.backend.target.checkpoint();
    this.awaitQuiet();
  }

  /** Between two messages. A failure ends the session. */
  private unlessEnded(operation: () => Promise<void>): void {
    this.operations
      .run(async () => {
        if (!this.isOver) await operation();
      })
      .catch((error: unknown) => this.ended.resolve(failure(error)));
  }

  private async finish({ reason, error }: SessionEnd): Promise<void> {
    this.backend.target.onConfigChange(() => {});
    this.backend.target.onTrackingLost(() => {});
    await this.backend.close(reason);
    this.connection[Symbol.dispose]();
    this.page[Symbol.dispose]();
    if (error === undefined) this.log.info(`session ended: ${reason}`);
    else this.log.warn(`session ended: ${sentence(error)}`);
  }
}

async function inTurn<T>(act: () => Promise<T>): Promise<T> {
  let acting: Promise<T> | undefined;
  await suspects.run(async () => {
    acting = act();
    await Deadline.after(TURN_PATIENCE, "turn of a session")
      .race(acting)
      .catch(() => {});
  });
  return await acting!;
}

function failure(thrown: unknown): SessionEnd {
  const error = asError(thrown);
  return { reason: error.message, error };
}
