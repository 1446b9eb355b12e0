import { Deadline } from "../base/deadline.ts";
import { asError, VhostdError } from "../base/errors.ts";
import { fieldSize } from "../base/layout.ts";
import type { Logger } from "../base/log.ts";
import type { RingEngine } from "../native/ring-engine.ts";
import type { SoftChange, SoftDevice, SoftOptionValue } from "../plugin.ts";
import { FeatureBit, featureBits, hasFeature, Status } from "../virtio/features.ts";
import { COMMON_CONFIG, type CommonRegister, Isr, NO_VECTOR } from "../virtio/registers.ts";
import { VirtioBlock } from "./layout.ts";

/** Bits 24 to 49 that every soft device offers. */
const CORE_FEATURES = featureBits(
  FeatureBit.version1,
  FeatureBit.accessPlatform,
  FeatureBit.ringIndirectDesc,
  FeatureBit.ringEventIdx,
);

/** Milliseconds for a worker to let go: one piece of I/O, or the system's flush of a file. */
const STOP_TIMEOUT = 30_000;

/** The device as its driver has set it up (VIRTIO 1.2, 4.1.4.3), queues apart. */
interface DriverState {
  status: number;
  deviceFeatureSelect: number;
  driverFeatureSelect: number;
  driverFeatures: bigint;
  configVector: number;
  queueSelect: number;
}

interface QueueRegisters {
  size: number;
  vector: number;
  enabled: boolean;
  desc: bigint;
  driver: bigint;
  device: bigint;
}

const RESET_STATE: Readonly<DriverState> = {
  status: 0,
  deviceFeatureSelect: 0,
  driverFeatureSelect: 0,
  driverFeatures: 0n,
  configVector: NO_VECTOR,
  queueSelect: 0,
};

/** What the device needs of the function that it is part of. */
export interface VirtioHost {
  readonly vectors: number;
  /** Borrowed; null where the vector is not routed. */
  vectorFd(vector: number): number | null;
  signal(vector: number): void;
  /** The function may reach memory: rings are served only then. */
  readonly busMaster: boolean;
  readonly log: Logger;
}

/**
 * The registers of a modern virtio PCI device and what writing them does: negotiation, queues, status (VIRTIO 1.2, 2.1
 * and 3.1). A driver that breaks the rules is told so by NEEDS_RESET, with the reason in the log.
 */
export class VirtioDevice {
  readonly features: bigint;
  private state: DriverState = { ...RESET_STATE };
  private readonly queues: QueueRegisters[];
  private configGeneration = 0;
  private isr = 0;
  private serving = false;

  /**
   * @param device of the class; owned by the caller, as the engine
   * @param ringSize largest size of each queue, entries
   */
  constructor(
    private readonly device: SoftDevice,
    private readonly engine: RingEngine,
    private readonly ringSize: number,
    private readonly host: VirtioHost,
  ) {
    this.features = CORE_FEATURES | device.features;
    this.queues = Array.from({ length: device.queues }, () => freshQueue(ringSize));
  }

  get status(): number {
    return this.state.status;
  }

  get driverFeatures(): bigint {
    return this.state.driverFeatures;
  }

  /** Indices of the queues that are in use. */
  get enabledQueues(): number[] {
    return [...this.queues.keys()].filter((index) => this.queues[index]!.enabled);
  }

  readCommon(offset: number, length: number): Uint8Array {
    const image = new Uint8Array(VirtioBlock.common.size);
    const view = new DataView(image.buffer);
    for (const [name, [at, type]] of Object.entries(COMMON_CONFIG)) {
      const value = this.register(name as CommonRegister);
      if (type === "u64") view.setBigUint64(at, BigInt(value), true);
      else if (type === "u32") view.setUint32(at, Number(value), true);
      else if (type === "u16") view.setUint16(at, Number(value), true);
      else view.setUint8(at, Number(value));
    }
    return image.slice(offset, offset + length);
  }

  /** One register, or one half of a 64-bit one; other accesses are ignored, as is writing what is read-only. */
  async writeCommon(offset: number, data: Uint8Array): Promise<void> {
    const value = littleEndian(data);
    for (const [name, [at, type]] of Object.entries(COMMON_CONFIG)) {
      if (type === "u64" && data.length === 4 && (offset === at || offset === at + 4)) {
        return this.writeHalf(name, offset === at ? 0n : 32n, value);
      }
      if (offset === at && data.length === fieldSize(type)) return this.writeRegister(name as CommonRegister, value);
    }
  }

  /** Reading clears (VIRTIO 1.2, 4.1.4.5). */
  readIsr(): number {
    const value = this.isr;
    this.isr = 0;
    return value;
  }

  readConfig(offset: number, length: number): Uint8Array {
    const bytes = new Uint8Array(length);
    bytes.set(this.device.config().subarray(offset, offset + length));
    return bytes;
  }

  async writeConfig(offset: number, data: Uint8Array): Promise<void> {
    await this.apply(this.device.writeConfig(offset, data));
  }

  /** A live option was set. @throws Error of the class where the value does not fit */
  async set(option: string, value: SoftOptionValue): Promise<void> {
    await this.apply(this.device.set(option, value));
  }

  /** Calls of the queues that use `vector` go there from now on. */
  onVectorRouted(vector: number): void {
    for (const [index, queue] of this.queues.entries()) {
      if (queue.vector === vector) this.routeCalls(index, queue);
    }
  }

  /** The driver lets the function reach memory, or no longer: it does not when this resolves. @throws VhostdError timedOut */
  async onBusMaster(): Promise<void> {
    if (this.host.busMaster) {
      if ((this.state.status & Status.driverOk) !== 0) this.serve();
    } else if (this.serving) {
      this.serving = false;
      await this.engine.park(workerDeadline());
    }
  }

  /** Nothing of the driver is left (VIRTIO 1.2, 2.4). @throws VhostdError timedOut while the worker hangs in the disk */
  async reset(): Promise<void> {
    await this.engine.stop("drop", workerDeadline());
    this.serving = false;
    this.state = { ...RESET_STATE };
    this.isr = 0;
    for (const index of this.queues.keys()) {
      this.queues[index] = freshQueue(this.ringSize);
      this.engine.setCall(index, null);
    }
    const change = this.device.reset?.();
    if (change?.parameters !== undefined) await this.engine.configure(change.parameters);
  }

  /** The rings cannot be used any more, or the driver broke the rules (VIRTIO 1.2, 2.1.2). */
  fail(reason: string): void {
    if ((this.state.status & Status.needsReset) !== 0) return;
    this.host.log.warn(`needs a reset: ${reason}`);
    this.state.status |= Status.needsReset;
    if ((this.state.status & Status.driverOk) !== 0) this.interruptConfig();
  }

  private register(name: CommonRegister): number | bigint {
    const { state } = this;
    const queue = this.queues[state.queueSelect];
    switch (name) {
      case "deviceFeatureSelect":
        return state.deviceFeatureSelect;
      case "deviceFeature":
        return featureHalf(this.features, state.deviceFeatureSelect);
      case "driverFeatureSelect":
        return state.driverFeatureSelect;
      case "driverFeature":
        return featureHalf(state.driverFeatures, state.driverFeatureSelect);
      case "configVector":
        return state.configVector;
      case "numQueues":
        return this.queues.length;
      case "deviceStatus":
        return state.status;
      case "configGeneration":
        return this.configGeneration;
      case "queueSelect":
        return state.queueSelect;
      case "queueSize":
        return queue?.size ?? 0;
      case "queueVector":
        return queue?.vector ?? NO_VECTOR;
      case "queueEnable":
        return queue?.enabled === true ? 1 : 0;
      case "queueNotifyOff":
      case "queueNotifyData":
        return queue === undefined ? 0 : state.queueSelect;
      case "queueDesc":
        return queue?.desc ?? 0n;
      case "queueDriver":
        return queue?.driver ?? 0n;
      case "queueDevice":
        return queue?.device ?? 0n;
      case "queueReset":
      case "adminQueueIndex":
      case "adminQueueNum":
        return 0;
    }
  }

  private async writeRegister(name: CommonRegister, value: number): Promise<void> {
    const { state } = this;
    const queue = this.queues[state.queueSelect];
    switch (name) {
      case "deviceFeatureSelect":
        state.deviceFeatureSelect = value;
        break;
      case "driverFeatureSelect":
        state.driverFeatureSelect = value;
        break;
      case "driverFeature":
        this.writeFeatures(value);
        break;
      case "configVector":
        state.configVector = value < this.host.vectors ? value : NO_VECTOR;
        break;
      case "deviceStatus":
        await this.writeStatus(value);
        break;
      case "queueSelect":
        state.queueSelect = value;
        break;
      case "queueSize":
        if (queue !== undefined && !queue.enabled) queue.size = value;
        break;
      case "queueVector":
        if (queue !== undefined) {
          queue.vector = value < this.host.vectors ? value : NO_VECTOR;
          this.routeCalls(state.queueSelect, queue);
        }
        break;
      case "queueEnable":
        // Writing 0 is not allowed to drivers (4.1.4.3.2) and does nothing.
        if (queue !== undefined && value === 1) await this.enable(state.queueSelect, queue);
        break;
      default:
        break;
    }
  }

  private writeHalf(name: string, shift: bigint, value: number): void {
    const queue = this.queues[this.state.queueSelect];
    if (queue === undefined || queue.enabled) return;
    const replace = (word: bigint) => (word & ~(0xffff_ffffn << shift)) | (BigInt(value) << shift);
    if (name === "queueDesc") queue.desc = replace(queue.desc);
    else if (name === "queueDriver") queue.driver = replace(queue.driver);
    else if (name === "queueDevice") queue.device = replace(queue.device);
  }

  /** Only until FEATURES_OK (3.1.1). */
  private writeFeatures(value: number): void {
    const { state } = this;
    if ((state.status & Status.featuresOk) !== 0 || state.driverFeatureSelect > 1) return;
    const shift = 32n * BigInt(state.driverFeatureSelect);
    state.driverFeatures = (state.driverFeatures & ~(0xffff_ffffn << shift)) | (BigInt(value) << shift);
  }

  private async writeStatus(value: number): Promise<void> {
    if (value === 0) return this.reset();
    const { state } = this;
    // A driver clears no bit (2.1.1); NEEDS_RESET is the device's.
    const asked = value & ~state.status & ~Status.needsReset;
    const { acknowledge, driver, featuresOk, driverOk, failed } = Status;
    state.status |= asked & (acknowledge | driver | failed);
    if ((asked & featuresOk) !== 0) this.acceptFeatures();
    if ((asked & driverOk) !== 0) {
      if ((state.status & featuresOk) === 0) return this.fail("DRIVER_OK was set before FEATURES_OK");
      state.status |= driverOk;
      if ((state.status & Status.needsReset) !== 0) this.interruptConfig();
      else this.serve();
    }
  }

  /** FEATURES_OK stays clear where the driver's choice cannot be served (3.1.1, step 6). */
  private acceptFeatures(): void {
    const { state } = this;
    const needed = Status.acknowledge | Status.driver;
    const unknown = state.driverFeatures & ~this.features;
    if ((state.status & needed) !== needed) {
      this.host.log.warn("FEATURES_OK refused: the driver has not set ACKNOWLEDGE and DRIVER");
    } else if (unknown !== 0n) {
      this.host.log.warn(`FEATURES_OK refused: feature bits 0x${unknown.toString(16)} were not offered`);
    } else if (!hasFeature(state.driverFeatures, FeatureBit.version1)) {
      this.host.log.warn("FEATURES_OK refused: the driver does not accept VERSION_1");
    } else {
      state.status |= Status.featuresOk;
    }
  }

  private async enable(index: number, queue: QueueRegisters): Promise<void> {
    if (queue.enabled) return;
    try {
      this.checkEnable(queue);
      await this.engine.activate(index, { ...queue, lastAvail: 0, lastUsed: 0 }, this.state.driverFeatures);
      queue.enabled = true;
    } catch (error) {
      this.fail(`queue ${index}: ${asError(error).message}`);
    }
  }

  /** @throws VhostdError invalid where a queue cannot be enabled now (4.1.4.3.2) */
  private checkEnable({ size }: QueueRegisters): void {
    if ((this.state.status & Status.featuresOk) === 0) throw new VhostdError("invalid", "enabled before FEATURES_OK");
    if (size > this.ringSize) {
      throw new VhostdError("invalid", `ring size ${size} is above the device's ${this.ringSize}`);
    }
  }

  private routeCalls(index: number, { vector, enabled }: QueueRegisters): void {
    this.engine.setCall(index, this.host.vectorFd(vector));
    // A call that was under way goes to where the vector was routed before, and nobody looks there.
    if (enabled) this.host.signal(vector);
  }

  private serve(): void {
    if (this.serving || !this.host.busMaster) return;
    try {
      this.engine.start(this.state.driverFeatures);
      this.serving = true;
    } catch (error) {
      this.fail(asError(error).message);
    }
  }

  private async apply(change: SoftChange): Promise<void> {
    if (change.parameters !== undefined) await this.engine.configure(change.parameters);
    if (change.configChanged !== true) return;
    this.configGeneration = (this.configGeneration + 1) & 0xff;
    if ((this.state.status & Status.driverOk) !== 0) this.interruptConfig();
  }

  private interruptConfig(): void {
    if (this.state.configVector === NO_VECTOR) this.isr |= Isr.config;
    else this.host.signal(this.state.configVector);
  }
}

function freshQueue(size: number): QueueRegisters {
  return { size, vector: NO_VECTOR, enabled: false, desc: 0n, driver: 0n, device: 0n };
}

function workerDeadline(): Deadline {
  return Deadline.after(STOP_TIMEOUT, "the end of the ring worker");
}

/** 32 bits of a feature word; a select beyond 1 shows none (4.1.4.3.1). */
function featureHalf(features: bigint, select: number): number {
  return select > 1 ? 0 : Number((features >> (32n * BigInt(select))) & 0xffff_ffffn);
}

function littleEndian(data: Uint8Array): number {
  return data.reduceRight((value, byte) => value * 256 + byte, 0);
}
