import { Deadline } from "../../base/deadline.ts";
import { asError, VhostdError } from "../../base/errors.ts";
import type { Json } from "../../base/json.ts";
import type { OwnedFd } from "../../native/fd.ts";
import { type Watch, watch } from "../../native/poller.ts";
import { drainEventfd, eventfd } from "../../native/sys.ts";
import type { Doorbell, FunctionSnapshot } from "../../pci/function.ts";
import { Status } from "../features.ts";
import { describeStatus, type VirtioPciDevice } from "../pci-device.ts";
import { NO_VECTOR } from "../registers.ts";
import { AdminMemory, DATA_MAX, HEADER_MAX, TRANSFER_MAX } from "./admin-memory.ts";
import { parseAdminQueueRecord } from "./admin-record.ts";
import { type AdminCommand, type AdminReply, AdminRing } from "./admin-ring.ts";
import { ADMIN_HEADER, AdminClass, IDENTITY_RESULT, MigrationCommand, vdevName } from "./vendor.ts";

/** Milliseconds between two looks at the used ring: hardware of the vendor raises no interrupt for it. */
const POLL_INTERVAL = 1;
/** The same, where nobody waits for what is in flight. */
const LATE_POLL_INTERVAL = 100;
/** Milliseconds for the answer that tells a dead queue from a slow command. */
const LIFE_SIGN_TIMEOUT = 3_000;
/** Milliseconds for the commands of an earlier process to end. */
const DRAIN_TIMEOUT = 10_000;
/** Milliseconds for the reset of the PF when the queue is closed. */
const CLOSE_TIMEOUT = 3_000;
/**
 * The part of the slots that unanswered commands may use up. Beyond it the rest is for VFs whose commands are answered:
 * of the largest ring enough for one command of each VF.
 */
const LOST_SHARE = 1 / 4;
/** Vector 0 would be that of configuration changes. */
const VECTOR = 1;

/** `draining`: commands of an earlier process are in flight; later ones wait. */
export type AdminQueueState =
  | { readonly kind: "ready" }
  | { readonly kind: "draining" }
  | { readonly kind: "dead"; readonly reason: string };

/** A command and who waits for it. */
interface Job {
  readonly command: AdminCommand;
  readonly reply: PromiseWithResolvers<AdminReply>;
  /** Commands completed when it was given to the device; undefined before that. */
  postedAt: number | undefined;
}

type CommandKind = Pick<AdminCommand, "vdevId" | "alters">;

/**
 * `left`: of an earlier process, and waited for before anything new; `lost`: the device still has it, and nobody waits;
 * `life`: somebody waits for anything at all.
 */
type Slot =
  | { readonly kind: "free" }
  | { readonly kind: "taken"; readonly job: Job }
  | ({ readonly kind: "left" } & CommandKind)
  | ({ readonly kind: "lost" } & CommandKind)
  | { readonly kind: "life" };

const FREE: Slot = { kind: "free" };

/** A command expired before the device got it. */
export class NeverPosted extends VhostdError {
  constructor(deadline: Deadline, why: string) {
    super("timedOut", `${deadline.error().message}; ${why}`);
    this.name = "NeverPosted";
  }
}

/** Where the queue is in its device. */
export interface AdminQueuePlace {
  readonly queue: number;
  readonly notifyOff: number;
}

export interface AdminQueueTimeouts {
  /** Milliseconds for the commands of an earlier process; 10 s. */
  readonly drain?: number;
  /** Milliseconds without any answer that make the queue a dead one; 3 s. */
  readonly lifeSign?: number;
}

/**
 * The admin virtqueue of a PF, driver side: several commands in flight, each completed by its head. What the device
 * writes is not trusted; where it makes no sense, or nothing is answered any more, the queue is dead. That is a state:
 * every command is rejected with the reason from then on, and the VFs go on.
 */
export class AdminQueue implements AsyncDisposable {
  private current: AdminQueueState;
  private readonly slots: Slot[];
  private readonly waiting: Job[] = [];
  private readonly ring: AdminRing;
  private readonly doorbell: Doorbell;
  private readonly watch: Watch | undefined;
  private readonly deadHandlers = new Set<(error: VhostdError) => void>();
  private timer: ReturnType<typeof setTimeout> | undefined;
  private drainDeadline: Deadline | undefined;
  /** Commands completed so far. */
  private completions = 0;
  private lookingForLife = false;
  private closed = false;

  private constructor(
    private readonly device: VirtioPciDevice,
    private readonly place: AdminQueuePlace,
    private readonly memory: AdminMemory,
    private readonly interrupt: OwnedFd | undefined,
    state: AdminQueueState,
    private readonly timeouts: AdminQueueTimeouts,
  ) {
    this.current = state;
    this.ring = new AdminRing(memory);
    this.slots = Array.from({ length: memory.slots + 1 }, () => FREE);
    this.doorbell = device.doorbell(place.queue, place.notifyOff);
    this.watch = interrupt && watch(interrupt.number, "in", () => this.onInterrupt(interrupt));
    void device.gone.then((error) => this.die(`the function is gone: ${error.message}`));
  }

  /**
   * Enables the queue of a device that has been negotiated with, and lets the device run. Takes the memory.
   * @throws VhostdError where the device does not take it
   */
  static async open(
    device: VirtioPciDevice,
    place: AdminQueuePlace,
    memory: AdminMemory,
    deadline: Deadline,
    timeouts: AdminQueueTimeouts = {},
  ): Promise<AdminQueue> {
    using undo = new DisposableStack();
    undo.use(memory);
    const vector = device.fn.interrupts.count > VECTOR ? VECTOR : NO_VECTOR;
    const interrupt = vector === NO_VECTOR ? undefined : undo.use(eventfd());
    if (interrupt !== undefined) await deadline.race(device.fn.interrupts.route(vector, interrupt.number));
    const { ring, ringSize } = memory;
    const queue = { index: place.queue, size: ringSize, vector, ...ring, lastAvail: 0, lastUsed: 0 };
    await deadline.race(device.setUpQueues(NO_VECTOR, [queue]));
    await deadline.race(device.run());
    const opened = new AdminQueue(device, place, memory, interrupt, { kind: "ready" }, timeouts);
    undo.move();
    return opened;
  }

  /**
   * Goes on with a queue as another process left it, without a reset. The commands that it waited for are waited for
   * before the first new one. Takes the fds.
   * @throws VhostdError invalid where the record or the fds do not fit
   */
  static revive(
    device: VirtioPciDevice,
    data: Json,
    fds: Map<string, OwnedFd>,
    timeouts: AdminQueueTimeouts = {},
  ): AdminQueue {
    using undo = new DisposableStack();
    for (const fd of fds.values()) undo.use(fd);
    const record = parseAdminQueueRecord(data);
    const [file, interrupt] = [fds.get("memory"), fds.get("interrupt")];
    if (file === undefined) throw new VhostdError("invalid", "the stored admin queue lacks its memory");
    if (fds.size !== (interrupt === undefined ? 1 : 2)) {
      throw new VhostdError("invalid", "the stored admin queue has spare fds");
    }
    const memory = AdminMemory.revive(file, record.iova, record.ringSize);
    const { dead } = record;
    const state: AdminQueueState = dead === null ? { kind: "draining" } : { kind: "dead", reason: dead };
    const queue = new AdminQueue(device, record, memory, interrupt, state, timeouts);
    undo.move();
    if (dead === null) queue.takeUp();
    return queue;
  }

  get state(): AdminQueueState {
    return this.current;
  }

  /** Why a VF cannot be altered now, or undefined. */
  obstacle(vdevId: number): string | undefined {
    const { current } = this;
    return current.kind === "dead" ? current.reason : this.refusal({ vdevId, alters: true })?.message;
  }

  /** The PF's. */
  get address(): string {
    return this.device.fn.address;
  }

  /** The device has a command that was never answered, after which the VF may be another. */
  mayStillAlter(vdevId: number): boolean {
    return this.slots.some((slot) => slot.kind === "lost" && slot.vdevId === vdevId && slot.alters);
  }

  /** Called once, with the reason, when the queue dies; at once where it has. Not any more once it is disposed of. */
  onDead(handler: (error: VhostdError) => void): Disposable {
    if (this.current.kind === "dead") handler(this.deadError(this.current.reason));
    else this.deadHandlers.add(handler);
    return { [Symbol.dispose]: () => void this.deadHandlers.delete(handler) };
  }

  /**
   * Resolves when the device has answered, whatever it says. Commands are taken up in the order in which they were
   * submitted and may end in any other.
   * @throws VhostdError timedOut, NeverPosted; adminQueue where the queue is dead; busy where too many commands of this
   *   VF were never answered, or one that may still alter it; cancelled
   */
  async submit(command: AdminCommand, deadline: Deadline): Promise<AdminReply> {
    checkCommand(command);
    if (this.closed) throw new VhostdError("cancelled", `the admin queue of ${this.address} was closed`);
    if (this.current.kind === "dead") throw this.deadError(this.current.reason);
    const refusal = this.refusal(command);
    if (refusal !== undefined) throw refusal;
    deadline.check();
    const job: Job = { command, reply: Promise.withResolvers<AdminReply>(), postedAt: undefined };
    this.waiting.push(job);
    this.advance();
    try {
      return await deadline.race(job.reply.promise);
    } catch (error) {
      const why = this.whyWaiting();
      this.forget(job);
      if (!(error instanceof VhostdError && error.code === "timedOut")) throw error;
      if (job.postedAt === undefined) throw new NeverPosted(deadline, why);
      if (job.postedAt === this.completions && command.ahead !== true) void this.lookForLife();
      throw error;
    }
  }

  /** Plain data and fds (borrowed). */
  snapshot(): FunctionSnapshot {
    const { memory, interrupt, current } = this;
    const { queue, notifyOff } = this.place;
    const fds = new Map([["memory", memory.file.number]]);
    if (interrupt !== undefined) fds.set("interrupt", interrupt.number);
    const dead = current.kind === "dead" ? current.reason : null;
    const { iova, ringSize } = memory;
    return { data: { queue, notifyOff, iova, ringSize, dead }, fds };
  }

  /** Lets go of everything of this process without a word to the device. */
  abandon(): void {
    if (this.closed) return;
    this.closed = true;
    this.rejectAll(new VhostdError("cancelled", `the admin queue of ${this.address} was closed`));
    clearTimeout(this.timer);
    this.watch?.[Symbol.dispose]();
    this.interrupt?.[Symbol.dispose]();
    this.memory[Symbol.dispose]();
  }

  /** Resets the PF, so that it leaves the memory alone, and lets go. The memory stays mapped in its domain. */
  async [Symbol.asyncDispose](): Promise<void> {
    if (this.closed) return;
    this.abandon();
    const deadline = Deadline.after(CLOSE_TIMEOUT, `reset of ${this.address}`);
    // Where it fails the memory is taken from the function when it is closed, which its owner does next.
    await this.device.reset(deadline).catch(() => {});
  }

  /** Why a command is not for the device now, or undefined. */
  private refusal({ vdevId, alters }: CommandKind): VhostdError | undefined {
    const lost = this.slots.filter((slot) => slot.kind === "lost");
    const own = lost.filter((slot) => slot.vdevId === vdevId);
    if (own.length === 0) return undefined;
    const fix = "wait until the PF has answered; or remove the PF and its VFs and add them again";
    const name = vdevName(vdevId);
    if (alters && own.some((slot) => slot.alters)) {
      const text = `${this.address} has not answered an earlier command that may still alter ${name}`;
      return new VhostdError("busy", text, { fix });
    }
    if (lost.length < this.memory.slots * LOST_SHARE) return undefined;
    return new VhostdError("busy", `${this.address} never answered ${own.length} commands of ${name}`, { fix });
  }

  /** What a command waits for that is not given to the device. */
  private whyWaiting(): string {
    if (this.current.kind === "draining") return "commands of an earlier process are in flight";
    const lost = this.slots.filter(({ kind }) => kind === "lost").length;
    return `it waited for a free slot, ${lost} of ${this.memory.slots} are held by commands that were never answered`;
  }

  /** Gives free slots to those that wait. */
  private advance(): void {
    if (this.current.kind !== "ready" || this.closed) return;
    try {
      for (;;) {
        const slot = this.slots.findIndex(({ kind }) => kind === "free");
        // The last one is for the life sign.
        const job = slot < 0 || slot >= this.memory.slots ? undefined : this.waiting.shift();
        if (job === undefined) break;
        // An earlier command of its VF may have got lost meanwhile.
        const refusal = this.refusal(job.command);
        if (refusal !== undefined) {
          job.reply.reject(refusal);
          continue;
        }
        job.postedAt = this.completions;
        this.post(slot, { kind: "taken", job }, job.command);
      }
    } catch (error) {
      this.die(asError(error).message);
    }
    this.schedule();
  }

  private post(slot: number, state: Slot, command: AdminCommand): void {
    this.slots[slot] = state;
    this.ring.post(slot, command);
    this.ringDoorbell();
  }

  /** Nobody waits for this command any more; a slot that the device has stays lost until it comes back. */
  private forget(job: Job): void {
    const at = this.waiting.indexOf(job);
    if (at >= 0) this.waiting.splice(at, 1);
    const slot = this.slots.findIndex((one) => one.kind === "taken" && one.job === job);
    if (slot >= 0 && !this.closed) this.giveUp(slot, job.command);
  }

  private giveUp(slot: number, { vdevId, alters }: CommandKind): void {
    this.slots[slot] = { kind: "lost", vdevId, alters };
    if (this.current.kind === "dead") return;
    try {
      this.ring.giveUp(slot, { vdevId, alters });
    } catch (error) {
      this.die(asError(error).message);
    }
  }

  private ringDoorbell(): void {
    this.doorbell.ring(this.place.queue).catch((error) => this.die(`its doorbell: ${asError(error).message}`));
  }

  private onInterrupt(interrupt: OwnedFd): void {
    if (this.closed) return;
    try {
      drainEventfd(interrupt.number);
    } catch (error) {
      this.die(`its interrupt: ${asError(error).message}`);
    }
    this.look();
    if (this.current.kind !== "dead") this.watch?.rearm();
  }

  /** What has the device done? */
  private look(): void {
    if (this.closed || this.current.kind === "dead") return;
    try {
      this.complete();
      if (this.current.kind === "draining") this.lookAtDrain();
    } catch (error) {
      this.die(asError(error).message);
    }
    this.advance();
    this.schedule();
  }

  private complete(): void {
    for (const index of this.ring.collect()) {
      const slot = this.slots[index];
      this.slots[index] = FREE;
      this.completions++;
      if (slot?.kind === "taken") slot.job.reply.resolve(this.ring.reply(index, slot.job.command.resultLength));
    }
  }

  /** Knows again what is in flight. */
  private takeUp(): void {
    try {
      for (const [index, { kind, vdevId, alters }] of this.ring.takeUp()) {
        this.slots[index] = { kind: kind === "awaited" ? "left" : "lost", vdevId, alters };
      }
    } catch (error) {
      this.die(asError(error).message);
      return;
    }
    this.drainDeadline = Deadline.after(this.timeouts.drain ?? DRAIN_TIMEOUT, "the commands of the earlier process");
    // The earlier process may have died between making a command available and saying so.
    this.ringDoorbell();
    this.look();
  }

  /** What does not come back in time gets lost as any other command does. */
  private lookAtDrain(): void {
    const left = [...this.slots.entries()].flatMap(([index, slot]) => (slot.kind === "left" ? [{ index, slot }] : []));
    if (left.length === 0) {
      this.current = { kind: "ready" };
    } else if (this.drainDeadline?.expired !== false) {
      this.current = { kind: "ready" };
      for (const { index, slot } of left) this.giveUp(index, slot);
      void this.lookForLife();
    }
  }

  /** Sees to it that the next look comes soon enough. */
  private schedule(): void {
    clearTimeout(this.timer);
    this.timer = undefined;
    if (this.closed || this.current.kind === "dead") return;
    const awaited =
      this.current.kind === "draining" || this.lookingForLife || this.slots.some(({ kind }) => kind === "taken");
    if (!awaited && this.slots.every(({ kind }) => kind === "free")) return;
    this.timer = setTimeout(() => this.look(), awaited ? POLL_INTERVAL : LATE_POLL_INTERVAL);
    if (!awaited) this.timer.unref();
  }

  /** Nothing came back while a command expired: is there anybody? */
  private async lookForLife(): Promise<void> {
    if (this.lookingForLife || this.closed || this.current.kind !== "ready") return;
    this.lookingForLife = true;
    const { completions } = this;
    const deadline = Deadline.after(this.timeouts.lifeSign ?? LIFE_SIGN_TIMEOUT, "a sign of life");
    try {
      const status = await deadline.race(this.device.status());
      if (this.closed) return;
      if ((status & Status.driverOk) === 0 || (status & Status.needsReset) !== 0) {
        return this.die(`the device stopped by itself: ${describeStatus(status)}`);
      }
      // Where it is taken an earlier life sign is on its way, which is as good.
      const slot = this.memory.slots;
      if (this.slots[slot]?.kind === "free") this.post(slot, { kind: "life" }, IDENTITY);
      this.schedule();
      const over = () => this.completions !== completions || this.closed || this.current.kind !== "ready";
      await deadline.poll(() => over() || undefined, POLL_INTERVAL);
    } catch (error) {
      this.die(`it answers nothing any more: ${asError(error).message}`);
    } finally {
      this.lookingForLife = false;
    }
  }

  private die(reason: string): void {
    if (this.closed || this.current.kind === "dead") return;
    this.current = { kind: "dead", reason };
    const error = this.deadError(reason);
    this.rejectAll(error);
    this.schedule();
    const handlers = [...this.deadHandlers];
    this.deadHandlers.clear();
    for (const handler of handlers) handler(error);
  }

  private rejectAll(error: VhostdError): void {
    for (const { reply } of this.waiting.splice(0)) reply.reject(error);
    for (const slot of this.slots) if (slot.kind === "taken") slot.job.reply.reject(error);
  }

  private deadError(reason: string): VhostdError {
    return new VhostdError("adminQueue", `the admin queue of ${this.address} is dead: ${reason}`, {
      fix: "its VFs go on but cannot be moved; to repair it, remove the PF and its VFs and add them again",
    });
  }
}

const IDENTITY: AdminCommand = {
  vdevId: 0,
  alters: false,
  header: ADMIN_HEADER.encode({ class: AdminClass.migration, command: MigrationCommand.identity }),
  data: new Uint8Array(0),
  resultLength: IDENTITY_RESULT.size,
};

/** @throws VhostdError invalid for a command that has no room in a slot */
function checkCommand({ header, data, payload, resultLength }: AdminCommand): void {
  const fits =
    header.length > 0 &&
    header.length <= HEADER_MAX &&
    data.length <= DATA_MAX &&
    (payload?.length ?? 0) <= TRANSFER_MAX &&
    resultLength >= 0 &&
    resultLength <= TRANSFER_MAX;
  if (!fits) throw new VhostdError("invalid", "an admin command does not fit into a slot");
}
