import { asError, sentence, VhostdError } from "../base/errors.ts";
import type { Json } from "../base/json.ts";
import type { Logger } from "../base/log.ts";
import { OperationQueue } from "../base/operation-queue.ts";
import type { OwnedFd } from "../native/fd.ts";
import { peerCredentials } from "../native/sys.ts";
import { Backend } from "./backend.ts";
import { Connection, type Incoming } from "./connection.ts";
import { ProtocolFeature, U64 } from "./messages.ts";
import { parseSessionRecord, type SessionRecord } from "./record.ts";
import { MemoryRefusal, MinorRefusal, Refusal } from "./refusal.ts";
import { type Answer, checkMessage, type RequestTable, requestTable, rowOf } from "./requests.ts";
import { FRESH_RECORD } from "./snapshot.ts";
import { featuresOf, type StateKind } from "./state.ts";
import type { SessionTarget } from "./target.ts";

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

interface Saved {
  readonly record: SessionRecord;
  takeFd(name: string): OwnedFd | undefined;
}

const FRESH: Saved = { record: FRESH_RECORD, takeFd: () => undefined };
const ACCEPTED = U64.encode({ value: 0n });
const REFUSED = U64.encode({ value: 1n });

/** One vhost-user connection of one VF, from connect to hang-up. */
export class Session {
  /** Process id of the front-end. */
  readonly peer: number;
  private readonly connection: Connection;
  private readonly backend: Backend;
  private readonly table: RequestTable;
  private readonly log: Logger;
  private readonly quietPeriod: number;
  /** Messages and what is done after the quiet period: one after the other. */
  private readonly operations = new OperationQueue();
  private readonly ended = Promise.withResolvers<SessionEnd>();
  private quiet: ReturnType<typeof setTimeout> | undefined;
  private abandoned = false;

  /**
   * Takes ownership of the connection.
   * @throws VhostdError where `saved` does not fit the target; the fds are the caller's then
   */
  constructor(fd: OwnedFd, target: SessionTarget, options: SessionOptions, saved: Saved = FRESH) {
    this.peer = peerCredentials(fd.number).pid;
    this.log = options.log;
    this.quietPeriod = options.quietPeriod ?? 50;
    this.table = requestTable(target.deviceClass, options.handlerTimeout);
    this.backend = new Backend(target, options.log, saved.record, saved.takeFd);
    this.connection = new Connection(fd, (request) => rowOf(this.table, request).payload[1]);
    target.onConfigChange(() => this.backend.configChanged());
    target.onTrackingLost((error) => this.unlessEnded(() => this.loseTracking(error)));
  }

  /**
   * Goes on where `snapshot` was taken; the next message is handled as if nothing had happened.
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
      const session = new Session(connection, target, options, { record, takeFd });
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
   */
  async run(): Promise<SessionEnd> {
    this.unlessEnded(() => this.goOn());
    const end = await Promise.race([this.serve(), this.ended.promise]);
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
      if (this.abandoned || this.backend.state.kind === "closed") return;
      await this.backend.target.checkpoint();
    });
  }

  /** Plain data beside the fds by name, borrowed. @throws VhostdError connectionLost after the end */
  snapshot(): { data: Json; fds: ReadonlyMap<string, number> } {
    const { record, fds } = this.backend.snapshot();
    fds.set("connection", this.connection.fd);
    return { data: record, fds };
  }

  /**
   * Lets go of everything of this process and touches neither function nor front-end: both go on for whoever holds
   * duplicates of the fds.
   */
  async abandon(): Promise<void> {
    this.abandoned = true;
    clearTimeout(this.quiet);
    this.connection.abandon()[Symbol.dispose]();
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

  /** Where an earlier process has left off. */
  private async goOn(): Promise<void> {
    await this.backend.followLogging();
    this.awaitQuiet();
  }

  private async serve(): Promise<SessionEnd> {
    try {
      for (;;) {
        using message = await this.connection.receive();
        if (message === undefined) return this.hungUp();
        await this.operations.run(() => this.handle(message));
        this.awaitQuiet();
      }
    } catch (error) {
      const isHangUp = error instanceof VhostdError && error.code === "connectionLost";
      return failure((isHangUp ? this.refusedMemory : undefined) ?? error);
    }
  }

  private hungUp(): SessionEnd {
    if (this.refusedMemory !== undefined) return failure(this.refusedMemory);
    return { reason: "the front-end closed the connection" };
  }

  /** The record is written before the answer: whoever comes after us finds what the front-end was told. */
  private async handle(message: Incoming): Promise<void> {
    if (this.backend.state.kind === "closed" || this.abandoned) return;
    const row = rowOf(this.table, message.request);
    checkMessage(row, message, this.backend);
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
      if (error instanceof MinorRefusal) return await this.answer(message, answer);
    }
    if (row.records) {
      await this.backend.followLogging();
      await this.backend.target.checkpoint();
    }
    if (answer === undefined && this.awaitsReply(message)) answer = ACCEPTED;
    await this.answer(message, answer);
  }

  private async answer(message: Incoming, answer: Answer): Promise<void> {
    if (answer !== undefined) await this.connection.reply(message.request, answer);
  }

  private awaitsReply(message: Incoming): boolean {
    return message.needReply && this.backend.has(ProtocolFeature.REPLY_ACK);
  }

  /** Begins the quiet period anew where something is done after it. */
  private awaitQuiet(): void {
    clearTimeout(this.quiet);
    if (this.abandoned || this.backend.state.kind === "closed" || !this.backend.awaitsQuiet) return;
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
        if (!this.abandoned && this.backend.state.kind !== "closed") await operation();
      })
      .catch((error: unknown) => this.ended.resolve(failure(error)));
  }

  private async finish({ reason, error }: SessionEnd): Promise<void> {
    this.backend.target.onConfigChange(() => {});
    this.backend.target.onTrackingLost(() => {});
    await this.backend.close(reason);
    this.connection[Symbol.dispose]();
    if (error === undefined) this.log.info(`session ended: ${reason}`);
    else this.log.warn(`session ended: ${sentence(error)}`);
  }
}

function failure(thrown: unknown): SessionEnd {
  const error = asError(thrown);
  return { reason: error.message, error };
}
