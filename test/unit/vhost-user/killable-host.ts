import { silentLogger } from "../../../src/base/log.ts";
import { socketPair } from "../../../src/native/sys.ts";
import type { DmaRange } from "../../../src/pci/address-space.ts";
import { describe, extentOf, overlaps, sameRange } from "../../../src/pci/ranges.ts";
import { Session, type SessionEnd } from "../../../src/vhost-user/session.ts";
import type { RingEventfds } from "../../../src/vhost-user/target.ts";
import type { DeviceState } from "../../../src/virtio/device-state.ts";
import type { Tracking } from "../../../src/virtio/dirty-log.ts";
import type { FreezeMode } from "../../../src/virtio/mover.ts";
import type { RingMemory } from "../../../src/virtio/split-ring.ts";
import { VhostUserFrontend } from "../../kit/frontend/frontend.ts";
import { MockTarget, type MockTargetOptions } from "../../kit/mock-target.ts";
import { copySession } from "./copy-session.ts";
import { LONG_QUIET } from "./harness.ts";

class Killed extends Error {}

/** Where the process may die. An event is named after what has happened, or is about to. */
interface Fate {
  /** @throws Killed */
  reach(event: string): void;
  /** @throws Killed where the process is dead already */
  checkAlive(): void;
  store(): void;
}

/** A VF that outlives the process which drives it, and does once what it is told twice. */
class LastingTarget extends MockTarget {
  constructor(
    options: MockTargetOptions,
    private readonly fate: Fate,
  ) {
    super(options);
  }

  /** A function that the record says runs does so. */
  takeUp(wanted: "running" | undefined): void {
    if (wanted === "running") this.running ??= this.last;
  }

  private last: DeviceState | undefined;

  override mapMemory(range: DmaRange): Promise<void> {
    const extent = extentOf(range);
    const conflict = this.mapped.find((other) => overlaps(extentOf(other), extent) && !sameRange(other, range));
    if (conflict !== undefined) throw new Error(`other memory is mapped at ${describe(extentOf(conflict))}`);
    return this.once(`map ${range.iova}`, this.has(range), () => super.mapMemory(range));
  }

  override unmapMemory(range: DmaRange): Promise<void> {
    return this.once(`unmap ${range.iova}`, !this.has(range), () => super.unmapMemory(range));
  }

  override async start(wanted: DeviceState, eventfds: ReadonlyMap<number, RingEventfds>): Promise<void> {
    // What a start writes before the device can run.
    await this.checkpoint();
    await this.once("start", this.running !== undefined, () => super.start(wanted, eventfds));
    this.eventfds = new Map(eventfds);
    this.last = wanted;
  }

  override prepare(wanted: DeviceState): Promise<void> {
    return this.once("prepare", false, () => super.prepare(wanted));
  }

  override track(wanted: Tracking | undefined): Promise<void> {
    return this.once("track", false, () => super.track(wanted));
  }

  override async stop(memory: RingMemory, mode: FreezeMode): Promise<DeviceState> {
    this.fate.checkAlive();
    const state = await super.stop(memory, mode);
    this.fate.reach("stop");
    return state;
  }

  override reset(): Promise<void> {
    return this.once("reset", false, () => super.reset());
  }

  override enable(queues: ReadonlySet<number>, eventfds: ReadonlyMap<number, RingEventfds>): Promise<void> {
    return this.once("enable", false, () => super.enable(queues, eventfds));
  }

  override setKick(queue: number, fd: number | null): Promise<void> {
    return this.once("setKick", false, () => super.setKick(queue, fd));
  }

  override setCall(queue: number, fd: number | null): Promise<void> {
    return this.once("setCall", false, () => super.setCall(queue, fd));
  }

  override writeConfig(offset: number, bytes: Uint8Array): Promise<void> {
    return this.once("writeConfig", false, async () => {
      await super.writeConfig(offset, bytes);
      this.config.set(bytes, offset);
    });
  }

  override async checkpoint(): Promise<void> {
    this.fate.checkAlive();
    this.fate.reach("record");
    this.fate.store();
    this.fate.reach("recorded");
  }

  private has(range: DmaRange): boolean {
    return this.mapped.some((other) => sameRange(other, range));
  }

  private async once(name: string, isDone: boolean, act: () => Promise<void>): Promise<void> {
    this.fate.checkAlive();
    if (!isDone) await act();
    this.fate.reach(name);
  }
}

export interface HostOptions extends MockTargetOptions {
  readonly quietPeriod?: number;
  /** The process dies when so many events have come, counted from 0. */
  readonly killAt?: readonly number[];
  /** Count where an answer is being sent, and nothing else. */
  readonly whileAnswering?: boolean;
}

/**
 * A session whose process is killed at chosen events and started again from the last record that it has written; the VF
 * and the front-end live on.
 */
export class KillableHost implements AsyncDisposable, Fate {
  readonly frontend: VhostUserFrontend;
  readonly target: LastingTarget;
  /** What has happened, in order. */
  readonly events: string[] = [];
  /** What the front-end was answered. */
  readonly answers: string[] = [];
  /** Of the session that has ended by itself. */
  readonly ended = Promise.withResolvers<SessionEnd>();
  session: Session;
  deaths = 0;
  private stored: ReturnType<typeof copySession> | undefined;
  private dying: Promise<void> | undefined;
  private message = "";
  private doomed = Number.POSITIVE_INFINITY;

  constructor(private readonly options: HostOptions = {}) {
    const [ours, theirs] = socketPair();
    this.target = new LastingTarget({ queues: 2, ...options }, this);
    this.frontend = new VhostUserFrontend(theirs);
    const receive = this.frontend.channel.receive.bind(this.frontend.channel);
    this.frontend.channel.receive = async () => {
      const message = await receive();
      if (message !== undefined) this.answers.push(`${message.request}: ${message.payload.toHex()}`);
      return message;
    };
    this.session = new Session(ours, this.target, this.sessionOptions);
    this.begin();
  }

  /** As seen from both sides. */
  get outcome() {
    const { target, session } = this;
    const { tracking, prepared, config } = target;
    return {
      status: session.status,
      mapped: target.mapped.map(({ iova, size }) => `${iova}+${size}`).sort(),
      running: target.running,
      prepared,
      config: config.toHex(),
      tracking: tracking && { end: tracking.end, size: tracking.log.size },
      eventfds: [...target.eventfds].map(([queue, { kick, call }]) => [queue, kick !== undefined, call !== undefined]),
    };
  }

  reach(event: string): void {
    if (this.options.whileAnswering !== undefined && this.options.whileAnswering !== event.startsWith("answer")) return;
    const at = this.events.push(`${this.message}: ${event}`) - 1;
    if (this.options.killAt?.includes(at) || at >= this.doomed) this.kill();
  }

  /** The process dies at the next event. */
  killNext(): void {
    this.doomed = this.events.length;
  }

  checkAlive(): void {
    if (this.dying !== undefined) throw new Killed();
  }

  store(): void {
    this.forget();
    this.stored = copySession(this.session);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.frontend[Symbol.dispose]();
    await this.ended.promise;
    this.forget();
  }

  private get sessionOptions() {
    return { log: silentLogger, quietPeriod: this.options.quietPeriod ?? LONG_QUIET };
  }

  private kill(): never {
    this.deaths++;
    this.doomed = Number.POSITIVE_INFINITY;
    this.dying = this.session.abandon();
    this.dying.then(() => this.revive()).catch((error: Error) => this.ended.resolve({ reason: "", error }));
    throw new Killed();
  }

  private async revive(): Promise<void> {
    // What was under way has failed by then.
    await Bun.sleep(0);
    const { data, fds } = this.stored!;
    this.stored = undefined;
    this.dying = undefined;
    this.session = Session.revive(this.target, data, fds, this.sessionOptions);
    this.stored = copySession(this.session);
    this.begin();
  }

  private begin(): void {
    const { session } = this;
    this.follow(session);
    const isRunning = session.status.state === "running";
    void session
      .run(async () => this.target.takeUp(isRunning ? "running" : undefined))
      .then((end) => this.ended.resolve(end));
  }

  private follow(session: Session): void {
    const { connection, page } = { connection: session["connection"], page: session["page"] };
    let answered = false;
    const peek = connection.peek.bind(connection);
    connection.peek = async () => {
      const message = await peek();
      if (message === undefined) return undefined;
      using undo = new DisposableStack();
      undo.use(message);
      answered = false;
      this.message = `${message.request}`;
      this.reach("came");
      undo.move();
      return {
        ...message,
        finish: () => {
          this.reach(answered ? "answered" : "to be finished");
          message.finish();
          this.reach("finished");
        },
      };
    };
    const note = page.noteAnswering.bind(page);
    page.noteAnswering = (header, payload) => {
      this.reach("to be replied to");
      note(header, payload);
    };
    const send = connection.send.bind(connection);
    connection.send = async (bytes) => {
      this.reach("answer to be sent");
      await send(bytes);
      answered = true;
    };
  }

  private forget(): void {
    for (const fd of this.stored?.fds.values() ?? []) fd[Symbol.dispose]();
    this.stored = undefined;
  }
}
