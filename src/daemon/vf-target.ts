import { Deadline } from "../base/deadline.ts";
import { asError } from "../base/errors.ts";
import type { Logger } from "../base/log.ts";
import type { OperationQueue } from "../base/operation-queue.ts";
import type { DmaRange } from "../pci/address-space.ts";
import type { DeviceClass } from "../plugin.ts";
import type { DoorbellShare, RingEventfds, SessionTarget } from "../vhost-user/target.ts";
import type { DeviceState } from "../virtio/device-state.ts";
import type { FreezeMode } from "../virtio/mover.ts";
import type { RingMemory } from "../virtio/split-ring.ts";
import type { Deadlines } from "./deadlines.ts";
import type { OpenRings } from "./open-rings.ts";
import type { Patience } from "./patience.ts";
import type { VfMemory } from "./vf-memory.ts";
import { usableQueues, type VfOptions, type VfParts } from "./vf-parts.ts";
import type { VfState } from "./vf-state.ts";

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
  /** The function was reset. */
  onReset(): void;
  /** The configuration space was read. */
  onConfig(config: Uint8Array): void;
  checkpoint(): Promise<void>;
}

/** What a session may do with a VF. Operations on one VF never interleave. */
export class VfTarget implements SessionTarget {
  readonly deviceClass: DeviceClass;
  readonly deviceFeatures: bigint;
  readonly queues: number;
  readonly dirtyTracking = false;
  /** Left out where the function shares none, or where the operator does not want it. */
  readonly doorbellShare?: (queue: number) => Promise<DoorbellShare | undefined>;
  /** A front-end may have mapped doorbells of the function, and hold it open in the kernel. */
  private shared = false;
  private configHandler: () => void = () => {};

  constructor(private readonly vf: TargetHost) {
    const { parts, options } = vf;
    this.deviceClass = parts.deviceClass;
    this.deviceFeatures = parts.dataPath.features;
    this.queues = usableQueues(parts);
    // The doorbells of a process are sockets or memory of its own.
    const mayShare = parts.entry.transport.kind === "vfio" && options.hostNotifier !== false;
    if (mayShare && this.sharesSome()) this.doorbellShare = async (queue) => this.share(queue);
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
        await vf.parts.dataPath.start(wanted, eventfds, deadline);
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

  stop(memory: RingMemory, mode: FreezeMode): Promise<DeviceState> {
    const { vf } = this;
    return vf.operations.run(async () => {
      vf.checkUsable();
      vf.become({ name: "stopping" });
      const state = await this.drain((deadline) => vf.parts.dataPath.stop(memory, mode, deadline));
      vf.rings.stopped(state);
      vf.checkUsable();
      vf.become({ name: "idle" });
      return state;
    });
  }

  reset(): Promise<void> {
    return this.vf.operations.run(async () => {
      await this.comeToRest();
      this.vf.rings.givenUp();
    });
  }

  release(memory: RingMemory): Promise<void> {
    const { vf } = this;
    return vf.operations.run(async () => {
      const { name } = vf.state();
      // From "stopping" where a stop has failed: the device may have come to its senses.
      if ((name === "running" || name === "stopping") && vf.parts.dataPath.moverKind !== "registers") {
        if (name === "running") vf.become({ name: "stopping" });
        try {
          await this.drain((deadline) => this.giveBack(memory, deadline), name === "stopping");
        } catch (error) {
          vf.log.warn("what the function had taken is not all given back", asError(error));
        }
      }
      await this.comeToRest();
      vf.rings.reset(memory);
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

  private share(queue: number): DoorbellShare | undefined {
    if (!this.canShare(queue)) return undefined;
    this.shared = true;
    return this.vf.parts.dataPath.shareDoorbell(queue);
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
