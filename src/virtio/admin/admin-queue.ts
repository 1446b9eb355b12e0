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
import { ADMIN_HEADER, AdminClass, IDENTITY_RESULT, MigrationCommand } from "./vendor.ts";

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
/** The part of the slots that unanswered commands may use up. Beyond it the rest is for VFs whose commands are answered. */
const LOST_SHARE = 1 / 2;
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
}

/** `lost`: nobody waits any more for what the device still has. */
type Slot =
  | { readonly kind: "free" }
  | { readonly kind: "taken"; readonly job: Job }
  | { readonly kind: "lost"; readonly vdevId: number };

const FREE: Slot = { kind: "free" };

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
  private readonly deadHandlers: ((error: VhostdError) => void)[] = [];
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
    this.slots = Array.from({ length: memory.slots }, () => FREE);
    this.doorbell = device.doorbell(place.queue, place.notifyOff);
    this.watch = interrupt && watch(interrupt.number, "in", () => this.onInterrupt(interrupt));
    void device.fn.lost.then((error) => this.die(`the function is gone: ${error.message}`));
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
   * Goes on with a queue as another process left it, without a reset. Its commands are waited for before the first new
   * one. Takes the fds.
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
    if (dead === null) queue.startDraining();
    return queue;
  }

  get state(): AdminQueueState {
    return this.current;
  }

  /** The PF's. */
  get address(): string {
    return this.device.fn.address;
  }

  /** Called once, with the reason, when the queue dies; at once where it has. */
  onDead(handler: (error: VhostdError) => void): void {
    if (this.current.kind === "dead") handler(this.deadError(this.current.reason));
    else this.deadHandlers.push(handler);
  }

  /**
   * Resolves when the device has answered, whatever it says. Commands are taken up in the order in which they were
   * submitted and may end in any other.
   * @throws VhostdError timedOut; adminQueue where the queue is dead; busy where too many commands of this VF were never
   *   answered; cancelled
   */
  async submit(command: AdminCommand, deadline: Deadline): Promise<AdminReply> {
    checkCommand(command);
    this.checkUsable(command.vdevId);
    deadline.check();
    const before = this.completions;
    const job: Job = { command, reply: Promise.withResolvers<AdminReply>() };
    this.waiting.push(job);
    this.advance();
    try {
      return await deadline.race(job.reply.promise);
    } catch (error) {
      this.forget(job);
      const expired = error instanceof VhostdError && error.code === "timedOut";
      if (expired && this.completions === before) void this.lookForLife();
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

  /** @throws VhostdError adminQueue, busy, cancelled */
  private checkUsable(vdevId: number): void {
    if (this.closed) throw new VhostdError("cancelled", `the admin queue of ${this.address} was closed`);
    if (this.current.kind === "dead") throw this.deadError(this.current.reason);
    const lost = this.slots.filter(({ kind }) => kind === "lost").length;
    const own = this.slots.filter((slot) => slot.kind === "lost" && slot.vdevId === vdevId).length;
    if (own === 0 || lost < this.slots.length * LOST_SHARE) return;
    throw new VhostdError("busy", `${own} commands of vdev ${vdevId} were never answered by ${this.address}`, {
      fix: "wait until the PF has answered them; or remove the PF and its VFs and add them again",
    });
  }

  /** Gives free slots to those that wait. */
  private advance(): void {
    if (this.current.kind !== "ready" || this.closed) return;
    try {
      for (;;) {
        const slot = this.slots.findIndex(({ kind }) => kind === "free");
        const job = slot < 0 ? undefined : this.waiting.shift();
        if (job === undefined) break;
        this.slots[slot] = { kind: "taken", job };
        this.ring.post(slot, job.command);
        this.ringDoorbell();
      }
    } catch (error) {
      this.die(asError(error).message);
    }
    this.schedule();
  }

  /** Nobody waits for this command any more; a slot that the device has stays lost until it comes back. */
  private forget(job: Job): void {
    const at = this.waiting.indexOf(job);
    if (at >= 0) this.waiting.splice(at, 1);
    const slot = this.slots.findIndex((one) => one.kind === "taken" && one.job === job);
    if (slot >= 0) this.slots[slot] = { kind: "lost", vdevId: job.command.vdevId };
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
      if (this.current.kind === "draining") this.lookAtDrain();
      else this.complete();
    } catch (error) {
      this.die(asError(error).message);
    }
    this.advance();
    this.schedule();
  }

  private complete(): void {
    const inFlight = this.slots.filter(({ kind }) => kind !== "free").length;
    for (const index of this.ring.collect(inFlight)) {
      const slot = this.slots[index]!;
      if (slot.kind === "free")
        throw new VhostdError("io", `the device broke the ring: command ${index} came back twice`);
      this.slots[index] = FREE;
      this.completions++;
      if (slot.kind === "taken") slot.job.reply.resolve(this.ring.reply(index, slot.job.command.resultLength));
    }
  }

  private startDraining(): void {
    this.drainDeadline = Deadline.after(this.timeouts.drain ?? DRAIN_TIMEOUT, "the commands of the earlier process");
    // The earlier process may have died between the two.
    this.ringDoorbell();
    this.look();
  }

  private lookAtDrain(): void {
    const left = this.ring.outstanding();
    if (left === 0) this.current = { kind: "ready" };
    else if (this.drainDeadline?.expired !== false) this.die(`${left} commands of an earlier process never ended`);
  }

  /** Sees to it that the next look comes soon enough. */
  private schedule(): void {
    clearTimeout(this.timer);
    this.timer = undefined;
    if (this.closed || this.current.kind === "dead") return;
    const awaited = this.current.kind === "draining" || this.slots.some(({ kind }) => kind === "taken");
    if (!awaited && this.slots.every(({ kind }) => kind === "free")) return;
    this.timer = setTimeout(() => this.look(), awaited ? POLL_INTERVAL : LATE_POLL_INTERVAL);
    if (!awaited) this.timer.unref();
  }

  /** Nothing came back while a command expired: is there anybody? */
  private async lookForLife(): Promise<void> {
    if (this.lookingForLife || this.closed || this.current.kind === "dead") return;
    this.lookingForLife = true;
    const deadline = Deadline.after(this.timeouts.lifeSign ?? LIFE_SIGN_TIMEOUT, "a sign of life");
    try {
      const status = await deadline.race(this.device.status());
      if ((status & Status.driverOk) === 0 || (status & Status.needsReset) !== 0) {
        this.die(`the device stopped by itself: ${describeStatus(status)}`);
      } else {
        await this.submit(IDENTITY, deadline);
      }
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
    for (const handler of this.deadHandlers.splice(0)) handler(error);
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
