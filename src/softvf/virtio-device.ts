import { asError, VhostdError } from "../base/errors.ts";
import type { Logger } from "../base/log.ts";
import { OperationQueue } from "../base/operation-queue.ts";
import type { RingEngine } from "../native/ring-engine.ts";
import type { SoftChange, SoftDevice, SoftOptionValue, StateField } from "../plugin.ts";
import type { VendorState } from "../virtio/admin/state-blob.ts";
import type { InternalStatusName } from "../virtio/admin/vendor.ts";
import { FeatureBit, featureBits, hasFeature, Status } from "../virtio/features.ts";
import { type CommonRegister, Isr, NO_VECTOR } from "../virtio/registers.ts";
import { DeviceRegisters, type QueueRegisters, registerAt } from "./device-registers.ts";
import { RingService } from "./ring-service.ts";
import { checkState, describeState, type RestoredState } from "./vf-state.ts";

/** Bits 24 to 49 that every soft device offers. */
const CORE_FEATURES = featureBits(
  FeatureBit.version1,
  FeatureBit.accessPlatform,
  FeatureBit.ringIndirectDesc,
  FeatureBit.ringEventIdx,
);

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
 * A modern virtio PCI device behind its registers: what writing them does (negotiation, queues, status: VIRTIO 1.2, 2.1
 * and 3.1), and what the PF's administrator does. A driver that breaks the rules is told so by NEEDS_RESET, with the
 * reason in the log. What two sides may ask for is done one after the other.
 */
export class VirtioDevice {
  private readonly registers: DeviceRegisters;
  private readonly service: RingService;
  private readonly operations = new OperationQueue();
  private readonly resetHandlers: (() => void)[] = [];
  private readonly dropHandlers: (() => void)[] = [];
  private isr = 0;

  /**
   * @param device of the class; owned by the caller, as the engine
   * @param ringSize largest size of each queue, entries
   */
  constructor(
    private readonly device: SoftDevice,
    private readonly engine: RingEngine,
    ringSize: number,
    private readonly host: VirtioHost,
  ) {
    const registers = new DeviceRegisters(CORE_FEATURES | device.features, device.queues, ringSize);
    this.registers = registers;
    this.service = new RingService(engine, {
      get serveable() {
        const { status } = registers.state;
        return host.busMaster && (status & (Status.driverOk | Status.needsReset)) === Status.driverOk;
      },
      get driverFeatures() {
        return registers.state.driverFeatures;
      },
      place: (queue) => registers.queues[queue]!,
      fail: (reason) => this.fail(reason),
      dropped: () => {
        for (const handler of this.dropHandlers) handler();
      },
    });
  }

  /** Device status (VIRTIO 1.2, 2.1). */
  get status(): number {
    return this.registers.state.status;
  }

  /** That the device offers. */
  get features(): bigint {
    return this.registers.features;
  }

  get driverFeatures(): bigint {
    return this.registers.state.driverFeatures;
  }

  /** Indices of the queues that are in use. */
  get enabledQueues(): number[] {
    const { queues } = this.registers;
    return [...queues.keys()].filter((index) => queues[index]!.enabled);
  }

  get internalStatus(): InternalStatusName {
    return this.service.status;
  }

  /** @param handler called after each reset, by whomever */
  onReset(handler: () => void): void {
    this.resetHandlers.push(handler);
  }

  /** @param handler called when nobody waits any more for what the rings had taken: after a reset, or a restore */
  onDrop(handler: () => void): void {
    this.dropHandlers.push(handler);
  }

  readCommon(offset: number, length: number): Uint8Array {
    return this.registers.read(offset, length);
  }

  /** One register, or one half of a 64-bit one; other accesses are ignored, as is writing what is read-only. */
  async writeCommon(offset: number, data: Uint8Array): Promise<void> {
    const target = registerAt(offset, data.length);
    if (target === undefined) return;
    const { name, half } = target;
    const value = littleEndian(data);
    await this.operations.run(async () => {
      if (half === undefined) await this.writeRegister(name, value);
      else this.registers.writeHalf(name, half, value);
    });
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

  /** The worker reaches the world outside now, or no longer. */
  async carrierChanged(up: boolean): Promise<void> {
    const change = this.device.carrierChanged?.(up);
    if (change !== undefined) await this.apply(change);
  }

  /** Calls of the queues that use `vector` go there from now on. */
  onVectorRouted(vector: number): void {
    for (const [index, queue] of this.registers.queues.entries()) {
      if (queue.vector === vector) this.routeCalls(index, queue);
    }
  }

  /** The driver lets the function reach memory, or no longer: it does not when this resolves. @throws VhostdError timedOut */
  onBusMaster(): Promise<void> {
    return this.operations.run(() => this.service.update());
  }

  /** Takes memory away, which no frozen ring needs. */
  unmapping(unmap: () => Promise<void>): Promise<void> {
    return this.operations.run(async () => {
      await this.service.beforeUnmap();
      await unmap();
    });
  }

  /** Nothing of the driver is left (VIRTIO 1.2, 2.4). @throws VhostdError timedOut while the worker hangs in the disk */
  reset(): Promise<void> {
    return this.operations.run(() => this.resetNow());
  }

  /** The rings cannot be used any more, or the driver broke the rules (VIRTIO 1.2, 2.1.2). */
  fail(reason: string): void {
    const { state } = this.registers;
    if ((state.status & Status.needsReset) !== 0) return;
    this.host.log.warn(`needs a reset: ${reason}`);
    state.status |= Status.needsReset;
    if ((state.status & Status.driverOk) !== 0) this.interruptConfig();
  }

  /**
   * One step of the internal status, by the administrator.
   * @param drain going from running to quiesced resolves only when everything that was taken is given back
   * @throws VhostdError notPermitted where it is no legal step; timedOut, cancelled (reset meanwhile) and invalid where
   * it did not succeed, and the status is what it was
   */
  async changeInternal(to: InternalStatusName, drain: boolean): Promise<void> {
    const { service } = this;
    const from = await this.operations.run(() => service.change(to));
    if (!drain || from !== "running") return;
    try {
      await service.drained();
    } catch (error) {
      await this.operations.run(async () => {
        if (error instanceof VhostdError && error.code === "timedOut" && service.status === "quiesced") {
          await service.change("running");
        }
      });
      throw error;
    }
  }

  /**
   * What a device needs to go on in place of this one.
   * @param lists whether a frozen device lists its chains in flight
   * @throws VhostdError timedOut while the worker is in one piece of I/O
   */
  save(lists: boolean): Promise<VendorState> {
    return this.operations.run(async () => {
      const rings = await this.service.rings();
      // What is in flight means something only while it stays so.
      const listed = lists && this.service.status === "freezed";
      const saved = { config: this.device.config(), fields: this.stateFields() };
      return describeState(this.registers, rings, saved, listed);
    });
  }

  /**
   * Takes the place of another device, frozen.
   * @throws VhostdError notPermitted where this one is not frozen, invalid with the reason where the state does not fit,
   * limitExceeded where no descriptor is left for its calls; nothing has changed then
   */
  restore(state: VendorState): Promise<void> {
    return this.operations.run(async () => {
      if (this.service.status !== "freezed")
        throw new VhostdError("notPermitted", "only a frozen function is restored");
      const { registers, device } = this;
      const { features, ringSize, queues } = registers;
      const restored = checkState(state, { features, ringSize, queues: queues.length, vectors: this.host.vectors });
      const vectors = restored.queues.map(({ vector }) => vector);
      // No vector is routed anew meanwhile: nobody waits for a worker that is parked.
      using calls = this.engine.prepareCalls(vectors.map((vector) => this.host.vectorFd(vector)));
      const changes = [await this.replace(restored)];
      calls.commit();
      registers.state = { ...restored.state };
      registers.generation = restored.generation;
      queues.splice(0, queues.length, ...restored.queues);
      for (const { vector, enabled } of restored.queues) if (enabled) this.host.signal(vector);
      this.isr = 0;
      // What a driver can write; all else is the device's own.
      changes.push(device.writeConfig(0, restored.config.subarray(0, device.config().length)));
      for (const { parameters } of changes) if (parameters !== undefined) await this.engine.configure(parameters);
    });
  }

  /**
   * The rings and the class's part of a state that is taken.
   * @throws VhostdError invalid with the reason; nothing has changed then
   */
  private async replace({ rings, state, fields }: RestoredState): Promise<SoftChange> {
    const { device } = this;
    const before = this.stateFields();
    const change = restoreFields(device, fields);
    try {
      await this.service.replace(rings, state.driverFeatures);
    } catch (error) {
      restoreFields(device, before);
      throw error;
    }
    return change;
  }

  private stateFields(): readonly StateField[] {
    return this.device.stateFields?.(this.engine.info()) ?? [];
  }

  private async resetNow(): Promise<void> {
    await this.service.reset();
    this.registers.reset();
    this.isr = 0;
    for (const index of this.registers.queues.keys()) this.engine.setCall(index, null);
    const change = this.device.reset?.();
    for (const handler of this.resetHandlers) handler();
    if (change?.parameters !== undefined) await this.engine.configure(change.parameters);
  }

  private async writeRegister(name: CommonRegister, value: number): Promise<void> {
    const { state, selected: queue } = this.registers;
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
        state.configVector = this.knownVector(value);
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
          queue.vector = this.knownVector(value);
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

  private knownVector(vector: number): number {
    return vector < this.host.vectors ? vector : NO_VECTOR;
  }

  /** Only until FEATURES_OK (3.1.1). */
  private writeFeatures(value: number): void {
    const { state } = this.registers;
    if ((state.status & Status.featuresOk) !== 0 || state.driverFeatureSelect > 1) return;
    const shift = 32n * BigInt(state.driverFeatureSelect);
    state.driverFeatures = (state.driverFeatures & ~(0xffff_ffffn << shift)) | (BigInt(value) << shift);
  }

  private async writeStatus(value: number): Promise<void> {
    if (value === 0) return this.resetNow();
    const { state } = this.registers;
    // A driver clears no bit (2.1.1); NEEDS_RESET is the device's.
    const asked = value & ~state.status & ~Status.needsReset;
    const { acknowledge, driver, featuresOk, driverOk, failed } = Status;
    state.status |= asked & (acknowledge | driver | failed);
    if ((asked & featuresOk) !== 0) this.acceptFeatures();
    if ((asked & driverOk) !== 0) {
      if ((state.status & featuresOk) === 0) return this.fail("DRIVER_OK was set before FEATURES_OK");
      state.status |= driverOk;
      if ((state.status & Status.needsReset) !== 0) this.interruptConfig();
      await this.service.onDriverOk();
    }
  }

  /** FEATURES_OK stays clear where the driver's choice cannot be served (3.1.1, step 6). */
  private acceptFeatures(): void {
    const { state, features } = this.registers;
    const needed = Status.acknowledge | Status.driver;
    const unknown = state.driverFeatures & ~features;
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
      const { size, desc, driver, device } = queue;
      const ring = { size, desc, driver, device, lastAvail: 0, lastUsed: 0 };
      await this.engine.activate(index, ring, this.driverFeatures);
      queue.enabled = true;
    } catch (error) {
      this.fail(`queue ${index}: ${asError(error).message}`);
    }
  }

  /** @throws VhostdError invalid where a queue cannot be enabled now (4.1.4.3.2) */
  private checkEnable({ size }: QueueRegisters): void {
    if ((this.status & Status.featuresOk) === 0) throw new VhostdError("invalid", "enabled before FEATURES_OK");
    const { ringSize } = this.registers;
    if (size > ringSize) throw new VhostdError("invalid", `ring size ${size} is above the device's ${ringSize}`);
  }

  private routeCalls(index: number, { vector, enabled }: QueueRegisters): void {
    this.engine.setCall(index, this.host.vectorFd(vector));
    // A call that was under way goes to where the vector was routed before, and nobody looks there.
    if (enabled) this.host.signal(vector);
  }

  private async apply(change: SoftChange): Promise<void> {
    if (change.parameters !== undefined) await this.engine.configure(change.parameters);
    if (change.configChanged !== true) return;
    this.registers.generation = (this.registers.generation + 1) & 0xff;
    if ((this.status & Status.driverOk) !== 0) this.interruptConfig();
  }

  private interruptConfig(): void {
    const { configVector } = this.registers.state;
    if (configVector === NO_VECTOR) this.isr |= Isr.config;
    else this.host.signal(configVector);
  }
}

/** @throws VhostdError invalid with the reason of the class */
function restoreFields(device: SoftDevice, fields: readonly StateField[]): SoftChange {
  try {
    return device.restoreFields?.(fields) ?? {};
  } catch (cause) {
    throw new VhostdError("invalid", `the device state does not fit: ${asError(cause).message}`, { cause });
  }
}

function littleEndian(data: Uint8Array): number {
  return data.reduceRight((value, byte) => value * 256 + byte, 0);
}
