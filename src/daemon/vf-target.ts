import { Deadline } from "../base/deadline.ts";
import { asError, VhostdError } from "../base/errors.ts";
import type { Logger } from "../base/log.ts";
import type { OperationQueue } from "../base/operation-queue.ts";
import type { DmaRange } from "../pci/address-space.ts";
import type { DeviceClass } from "../plugin.ts";
import type {
  Delivered,
  Delivery,
  DoorbellShare,
  RecordChange,
  RingEventfds,
  SessionTarget,
} from "../vhost-user/target.ts";
import type { DeviceState } from "../virtio/device-state.ts";
import type { Tracking } from "../virtio/dirty-log.ts";
import type { FreezeMode, StopNote } from "../virtio/mover.ts";
import type { RingMemory } from "../virtio/split-ring.ts";
import type { Deadlines } from "./deadlines.ts";
import { ManualLogging } from "./manual-logging.ts";
import { Migration } from "./migration.ts";
import type { OpenRings } from "./open-rings.ts";
import type { Patience } from "./patience.ts";
import type { VfMemory } from "./vf-memory.ts";
import { usableQueues, type VfOptions, type VfParts } from "./vf-parts.ts";
import type { VfState } from "./vf-state.ts";

/** Milliseconds between two times that a VF is to stand by: front-ends that come and go are not to keep its PF busy. */
const STAND_BY_INTERVAL = 1_000;
/** Milliseconds that a front-end that has gone waits at most for a VF that was to stand by. */
const STAND_BY_PATIENCE = 1_000;

/** The VF that a session drives. */
export interface TargetHost {
  readonly options: VfOptions;
  readonly parts: VfParts;
  readonly deadlines: Deadlines;
  readonly log: Logger;
  readonly rings: OpenRings;
  readonly memory: VfMemory;
  readonly patience: Patience;
  readonly operations: OperationQueue;
  state(): VfState;
  become(next: VfState): void;
  /** @throws VhostdError where the VF has failed */
  checkUsable(): void;
  fail(error: Error): void;
  /** The function runs for its guest. */
  onRunning(): Promise<void>;
  /** Who comes after this process is not to take it for a reset by somebody else. */
  beforeReset(): Promise<void>;
  /** The session ends, and the function has given everything back. */
  beforeEnd(): Promise<void>;
  /** The function was reset. */
  onReset(): void;
  /** The configuration space was read. */
  onConfig(config: Uint8Array): void;
  /** What is known of its migration has changed. */
  onMigration(): void;
  /** Process of the front-end that is connected. */
  peer(): number | undefined;
  checkpoint(): Promise<void>;
  /** undefined where the keeper is none that can. */
  deliver(delivery: Delivery, change: RecordChange): Promise<Delivered> | undefined;
}

/** What a session may do with a VF. Operations on one VF never interleave. */
export class VfTarget implements SessionTarget {
  readonly deviceClass: DeviceClass;
  readonly deviceFeatures: bigint;
  readonly queues: number;
  readonly presetup: boolean;
  readonly migration: Migration;
  /** The log of an operator. */
  readonly byHand: ManualLogging;
  /** Left out where the function shares none, or where the operator does not want it. */
  readonly doorbellShare?: (queue: number) => Promise<DoorbellShare | undefined>;
  /** A front-end may have mapped doorbells of the function, and hold it open in the kernel. */
  private shared = false;
  /** The function is to mark the pages that it writes. */
  private tracked = false;
  /** Of the process's clock, milliseconds. */
  private lastStandBy = -Infinity;
  /** Its front-end has not gone yet. */
  private startExpected = false;
  private standingBy: Deadline | undefined;
  private configHandler: () => void = () => {};
  private lostHandler: (error: Error) => void = () => {};

  constructor(private readonly vf: TargetHost) {
    const { parts, options } = vf;
    this.deviceClass = parts.deviceClass;
    this.deviceFeatures = parts.dataPath.features;
    this.queues = usableQueues(parts);
    this.presetup = options.frontend === "nvidia-presetup";
    this.migration = new Migration(vf.log, () => vf.onMigration());
    const { address } = options;
    this.byHand = new ManualLogging({ ...vf, address, frontEndLogs: () => this.migration.isMarking });
    parts.dataPath.onTrackingLost((error) => this.loseTracking(error));
    // The doorbells of a process are sockets or memory of its own.
    const mayShare = parts.entry.transport.kind === "vfio" && options.hostNotifier !== false;
    if (mayShare && this.sharesSome()) this.doorbellShare = (queue) => this.share(queue);
  }

  /** As an earlier process knew it. */
  wasShared(): void {
    this.shared = true;
  }

  get dirtyTracking(): boolean {
    return this.vf.parts.dataPath.capabilities.dirtyTracking;
  }

  /** A front-end was given doorbells: its mappings keep the kernel from resetting the function when it is closed. */
  get hasShared(): boolean {
    return this.shared;
  }

  queueSizeMax(index: number): number {
    return this.vf.parts.dataPath.queueSizeMax(index);
  }

  async readConfig(): Promise<Uint8Array> {
    const { dataPath, config: known } = this.vf.parts;
    const config = await dataPath.readConfig(known.length);
    known.set(config);
    this.vf.onConfig(config);
    return config;
  }

  writeConfig(offset: number, bytes: Uint8Array): Promise<void> {
    return this.vf.parts.dataPath.writeConfig(offset, bytes);
  }

  mapMemory(range: DmaRange, fd: number): Promise<void> {
    return this.vf.memory.map(range, fd);
  }

  unmapMemory(range: DmaRange): Promise<void> {
    return this.vf.memory.unmap(range);
  }

  start(wanted: DeviceState, eventfds: ReadonlyMap<number, RingEventfds>): Promise<void> {
    const { vf } = this;
    return vf.operations.run(async () => {
      vf.checkUsable();
      vf.rings.begin(wanted);
      vf.become({ name: "configuring" });
      try {
        const deadline = Deadline.after(vf.deadlines.start, `start of ${this.address}`);
        const { dataPath } = vf.parts;
        await this.migration.start(wanted, vf.peer(), () =>
          dataPath.start(wanted, eventfds, deadline, () => vf.checkpoint()),
        );
        // It may have got lost meanwhile.
        vf.checkUsable();
        vf.become({ name: "running" });
        await vf.onRunning();
      } catch (error) {
        vf.checkUsable();
        vf.become({ name: "stopping" });
        vf.become({ name: "idle" });
        throw error;
      }
    });
  }

  standBy(): void {
    const { vf } = this;
    const { standBys } = vf.parts.mover;
    if (standBys === undefined || performance.now() - this.lastStandBy < STAND_BY_INTERVAL) return;
    this.lastStandBy = performance.now();
    this.startExpected = true;
    const work = async () => {
      if (!this.startExpected || vf.state().name !== "idle") return;
      const deadline = Deadline.after(vf.deadlines.start, `${this.address} standing by`);
      this.standingBy = deadline;
      await vf.parts.dataPath.standBy(deadline);
    };
    standBys
      .run(() => vf.operations.run(work))
      .catch((error) => vf.log.debug(`its start is not made ready: ${asError(error).message}`));
  }

  prepare(wanted: DeviceState): Promise<void> {
    const { vf } = this;
    return vf.operations.run(async () => {
      vf.checkUsable();
      const deadline = Deadline.after(vf.deadlines.start, `early set-up of ${this.address}`);
      await this.migration.prepare(() => vf.parts.dataPath.prepare(wanted, deadline));
    });
  }

  track(wanted: Tracking | undefined): Promise<void> {
    const { vf } = this;
    return vf.operations.run(async () => {
      const what = `${wanted === undefined ? "ending" : "beginning"} to mark what ${this.address} writes`;
      await this.byHand.giveWay("its front-end logs itself");
      await this.migration.track(wanted, async () => {
        this.tracked = wanted !== undefined;
        await vf.parts.dataPath.track(wanted, Deadline.after(vf.deadlines.start, what));
      });
    });
  }

  onTrackingLost(handler: (error: Error) => void): void {
    this.lostHandler = handler;
  }

  stop(memory: RingMemory, mode: FreezeMode): Promise<DeviceState> {
    const { vf } = this;
    return vf.operations.run(async () => {
      vf.checkUsable();
      vf.become({ name: "stopping" });
      const { dataPath } = vf.parts;
      const halt = (note?: StopNote) => this.drain((deadline) => dataPath.stop(memory, mode, deadline, note));
      // One that keeps something goes on at once.
      const state = await (mode === "drained" ? this.migration.stop(halt) : halt());
      vf.rings.stopped(state);
      vf.checkUsable();
      vf.become({ name: "idle" });
      return state;
    });
  }

  reset(): Promise<void> {
    return this.vf.operations.run(async () => {
      if (this.vf.state().name === "running") await this.vf.beforeReset();
      await this.comeToRest();
      this.migration.wasReset();
      this.vf.rings.givenUp();
    });
  }

  release(memory: RingMemory): Promise<void> {
    const { vf } = this;
    this.startExpected = false;
    this.standingBy?.shorten(STAND_BY_PATIENCE);
    return vf.operations.run(async () => {
      const { tracked } = this;
      this.tracked = false;
      const { name } = vf.state();
      // From "stopping" where a stop has failed: the device may have come to its senses.
      if ((name === "running" || name === "stopping") && vf.parts.dataPath.moverKind !== "registers") {
        if (name === "running") vf.become({ name: "stopping" });
        try {
          await this.drain((deadline) => this.giveBack(memory, deadline), name === "stopping");
          if (vf.rings.isClean) await vf.beforeEnd();
        } catch (error) {
          vf.log.warn("what the function had taken is not all given back", asError(error));
        }
      }
      try {
        await this.comeToRest();
      } finally {
        await this.trackNoMore();
        this.migration.ended();
      }
      vf.rings.reset(memory);
      const state = vf.state();
      // What it had noted and nobody has collected went with it.
      if (tracked && state.name === "failed") throw new VhostdError("io", `it has failed: ${state.reason}`);
    });
  }

  enable(queues: ReadonlySet<number>, eventfds: ReadonlyMap<number, RingEventfds>, memory: RingMemory): Promise<void> {
    return this.vf.operations.run(async () => {
      this.vf.checkUsable();
      await this.drain((deadline) => this.vf.parts.dataPath.enable(queues, eventfds, memory, deadline));
    });
  }

  setKick(queue: number, fd: number | null): Promise<void> {
    return this.vf.parts.dataPath.setKick(queue, fd);
  }

  setCall(queue: number, fd: number | null): Promise<void> {
    return this.vf.parts.dataPath.setCall(queue, fd);
  }

  onConfigChange(handler: () => void): void {
    this.configHandler = handler;
  }

  /** The device says that its configuration space changed. */
  configChanged(): void {
    this.configHandler();
  }

  checkpoint(): Promise<void> {
    return this.vf.checkpoint();
  }

  async deliver(delivery: Delivery, change: RecordChange): Promise<Delivered> {
    const delivered = await this.vf.deliver(delivery, change);
    if (delivered !== undefined) return delivered;
    if (change !== "nothing") await this.vf.checkpoint();
    return { kind: "undone" };
  }

  /** Not all that the function writes is marked from now on. Nobody is harmed by what is missing in a log of an operator's. */
  loseTracking(error: Error): void {
    if (this.byHand.isOn) this.byHand.lost(error.message);
    else {
      this.migration.lost();
      this.lostHandler(error);
    }
  }

  /** Lets go of what is this process's. */
  abandon(): void {
    this.migration.abandon();
    this.byHand.abandon();
  }

  /** @param again it has been tried before: there is as little time as at the last */
  private drain<T>(work: (deadline: Deadline) => Promise<T>, again = false): Promise<T> {
    const { drain, lastDrain } = this.vf.deadlines;
    const time = again ? Math.min(drain, lastDrain) : drain;
    return this.vf.patience.during(`${this.address} giving back what it has taken`, time, work);
  }

  private async giveBack(memory: RingMemory, deadline: Deadline): Promise<void> {
    const { dataPath } = this.vf.parts;
    // A device that can only be drained, not frozen, comes to no end while its guest goes on.
    if (!dataPath.capabilities.resumeAnywhere) await dataPath.mute(deadline);
    this.vf.rings.stopped(await dataPath.stop(memory, "drained", deadline));
  }

  /** The log is the front-end's, which goes. */
  private async trackNoMore(): Promise<void> {
    await this.byHand.giveWay("the session of its front-end has ended");
    const { parts, deadlines, log } = this.vf;
    const deadline = Deadline.after(deadlines.reset, `ending to mark what ${this.address} writes`);
    await parts.dataPath.track(undefined, deadline).catch((error) => {
      log.warn(
        "its PF may still mark what it writes; what it marks in stays mapped until the PF is removed",
        asError(error),
      );
    });
  }

  private async comeToRest(): Promise<void> {
    const { vf } = this;
    // What it may still be doing must not meet memory that is unmapped next.
    if (vf.state().name === "failed") return await this.cutOff();
    if (vf.state().name === "running") vf.become({ name: "stopping" });
    try {
      await vf.parts.dataPath.reset(Deadline.after(vf.deadlines.reset, `reset of ${this.address}`));
    } catch (error) {
      vf.fail(asError(error));
      await this.cutOff();
      throw error;
    }
    vf.onReset();
    if (vf.state().name === "stopping") vf.become({ name: "idle" });
  }

  private async cutOff(): Promise<void> {
    const { parts, deadlines, log } = this.vf;
    const deadline = Deadline.after(deadlines.reset, `taking bus mastering from ${this.address}`);
    await parts.dataPath.cutOff(deadline).catch((error) => log.debug(`it is gone: ${asError(error).message}`));
  }

  private sharesSome(): boolean {
    return Array.from({ length: this.queues }, (_, queue) => this.canShare(queue)).includes(true);
  }

  /** Who comes after this process has to know it before the front-end can do anything with it. */
  private async share(queue: number): Promise<DoorbellShare | undefined> {
    if (!this.canShare(queue)) return undefined;
    const isFirst = !this.shared;
    this.shared = true;
    const share = this.vf.parts.dataPath.shareDoorbell(queue);
    if (isFirst) await this.vf.checkpoint();
    return share;
  }

  private canShare(queue: number): boolean {
    try {
      return this.vf.parts.dataPath.canShareDoorbell(queue);
    } catch (error) {
      // A start says so, where a guest wants this queue.
      this.vf.log.debug(`queue ${queue} has no doorbell: ${asError(error).message}`);
      return false;
    }
  }

  private get address(): string {
    return this.vf.options.address;
  }
}
