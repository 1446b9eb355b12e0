import type { Deadline } from "../base/deadline.ts";
import { VhostdError } from "../base/errors.ts";
import { fieldSize } from "../base/layout.ts";
import type { AccessWidth, Doorbell, PciFunction, RegisterSpace } from "../pci/function.ts";
import type { QueueState } from "./device-state.ts";
import { FeatureBit, Status } from "./features.ts";
import { type PciLayout, probeLayout } from "./pci-layout.ts";
import {
  COMMON_CONFIG,
  COMMON_CONFIG_SIZE,
  type CommonRegister,
  NO_VECTOR,
  PciCommand,
  PciConfig,
  type WritableCommonRegister,
} from "./registers.ts";
import { isRingSize } from "./split-ring.ts";

/** What a queue of the device is before a driver sets it up; plain data. */
export type QueueLimits = {
  /** Largest ring, entries; 0 where the queue is not available. */
  readonly sizeMax: number;
  /** Where its doorbell is: multiples of the notification multiplier. */
  readonly notifyOff: number;
};

/** Milliseconds between two looks at a device that is resetting. */
const RESET_INTERVAL = 1;
/** Reads of a configuration space that changes all the time. */
const GENERATION_TRIES = 32;
/** What a register of one byte reads where nobody answers. */
const ALL_ONES = 0xff;
/** Queues looked at; a device that claims more has them unused. */
const QUEUES_MAX = 1024;

/**
 * A modern virtio PCI device, driver side (VIRTIO 1.2, 3.1 and 4.1). Its accesses are issued together and awaited
 * together where the specification asks for an order only: over a socket that is one round trip instead of many.
 *
 * The function reaches memory only while its driver wants it to. In this order: it is opened, and probed, which takes bus
 * mastering away; status 0 is awaited; it is attached to its DMA domain; its driver gives it bus mastering when it begins to
 * set it up; status 0 is awaited, or bus mastering taken away, before what it was given is unmapped.
 */
export class VirtioPciDevice {
  private readonly common: RegisterSpace;
  private readonly deviceConfig: RegisterSpace | undefined;
  private readonly silent = Promise.withResolvers<Error>();
  /** Resolves with the reason when the function is gone: its transport says so, or nobody answers at its registers. */
  readonly gone: Promise<Error>;
  /** Of the configuration space as it was read last (4.1.4.3), which counts its changes; 0 before that. */
  configGeneration = 0;

  /** A device whose layout is known (probed, or from a record). No register is touched. @throws VhostdError barRead */
  constructor(
    readonly fn: PciFunction,
    readonly layout: PciLayout,
  ) {
    this.common = fn.region(layout.common.bar);
    this.deviceConfig = layout.device === null ? undefined : fn.region(layout.device.bar);
    this.gone = Promise.race([fn.lost, this.silent.promise]);
  }

  /** @throws VhostdError probeFailed where it is no modern virtio device */
  static async probe(fn: PciFunction, deadline: Deadline): Promise<VirtioPciDevice> {
    return new VirtioPciDevice(fn, await deadline.race(probeLayout(fn)));
  }

  get virtioId(): number {
    return this.layout.virtioId;
  }

  /** Bytes of device configuration space. */
  get configLength(): number {
    return this.layout.device?.size ?? 0;
  }

  /** The feature bits that the device offers, all 64 (2.2). */
  async features(): Promise<bigint> {
    const [, low, , high] = await Promise.all([
      this.write("deviceFeatureSelect", 0),
      this.read("deviceFeature"),
      this.write("deviceFeatureSelect", 1),
      this.read("deviceFeature"),
    ]);
    return BigInt(low) | (BigInt(high) << 32n);
  }

  /** @throws VhostdError noDevice where nobody answers; the function is gone then */
  async status(): Promise<number> {
    const status = await this.read("deviceStatus");
    if (status !== ALL_ONES) return status;
    const error = new VhostdError("noDevice", `${this.name} does not answer any more: its registers read all ones`, {
      fix: "look at the host's kernel log; plug the device in again, or reset it",
    });
    this.silent.resolve(error);
    throw error;
  }

  /**
   * Status 0, awaited: the device uses no memory and sends no interrupt any more (4.1.4.3.1). Bus mastering stays as it
   * is. A device that does not answer is waited for: it may be in the middle of a function-level reset.
   * @throws VhostdError resetTimedOut
   */
  async reset(deadline: Deadline): Promise<void> {
    await deadline.race(this.write("deviceStatus", 0));
    let seen = 0;
    try {
      await deadline.poll(async () => {
        seen = await deadline.race(this.read("deviceStatus"));
        return seen === 0 ? true : undefined;
      }, RESET_INTERVAL);
    } catch (cause) {
      if (!(cause instanceof VhostdError && cause.code === "timedOut")) throw cause;
      throw new VhostdError("resetTimedOut", `${this.name} did not reset: its status stays 0x${seen.toString(16)}`, {
        fix: "reset the function's device, or its host",
        cause,
      });
    }
  }

  /**
   * Whether the function may reach memory and signal vectors (PCI Local Bus 3.0, 6.2.2). One that may not keeps its
   * configuration, its rings' indices too.
   */
  async setBusMaster(on: boolean): Promise<void> {
    const command = await this.fn.config.read(PciConfig.command, 2);
    const wanted = on ? command | PciCommand.busMaster : command & ~PciCommand.busMaster;
    if (wanted !== command) await this.fn.config.write(PciConfig.command, 2, wanted);
  }

  /**
   * From reset to "features accepted" (3.1.1, steps 2 to 6). The function may reach memory from now on; until it was reset
   * it might still have had the rings of an earlier guest.
   * @throws VhostdError notSupported where the device does not accept the features
   */
  async negotiate(features: bigint): Promise<void> {
    await this.setBusMaster(true);
    const begun = Status.acknowledge | Status.driver;
    const results = await Promise.all([
      this.write("deviceStatus", Status.acknowledge),
      this.write("deviceStatus", begun),
      this.write("driverFeatureSelect", 0),
      this.write("driverFeature", Number(features & 0xffff_ffffn)),
      this.write("driverFeatureSelect", 1),
      this.write("driverFeature", Number(features >> 32n)),
      this.write("deviceStatus", begun | Status.featuresOk),
      this.status(),
    ]);
    const status = results.at(-1) ?? 0;
    if ((status & Status.featuresOk) === 0) {
      throw new VhostdError("notSupported", `${this.name} does not accept the features 0x${features.toString(16)}`);
    }
  }

  /**
   * Vectors and rings, enabled and read back (4.1.5.1.2 and 4.1.5.1.3).
   * @throws VhostdError noVectors, notSupported where the device does not take a value
   */
  async setUpQueues(configVector: number, queues: readonly QueueState[]): Promise<void> {
    const config = this.writeBack("configVector", configVector, "for configuration changes", queues.length);
    await Promise.all([config, ...queues.map((queue) => this.setUpQueue(queue, queues.length))]);
  }

  /** Whether the device was told to use this queue. */
  async isEnabled(queue: number): Promise<boolean> {
    const [, enabled] = await Promise.all([this.write("queueSelect", queue), this.read("queueEnable")]);
    return enabled === 1;
  }

  /** The device may use its queues from now on. @throws VhostdError io where it says otherwise */
  async run(): Promise<void> {
    const running = Status.acknowledge | Status.driver | Status.featuresOk | Status.driverOk;
    const [, status] = await Promise.all([this.write("deviceStatus", running), this.status()]);
    if (status !== running) throw new VhostdError("io", `${this.name} did not start: ${describeStatus(status)}`);
  }

  /** What a freshly reset device says of its queues, by index. */
  async queueLimits(): Promise<QueueLimits[]> {
    const count = Math.min(await this.read("numQueues"), QUEUES_MAX);
    const asked = Array.from({ length: count }, async (_, index) => {
      const [, sizeMax, notifyOff] = await Promise.all([
        this.write("queueSelect", index),
        this.read("queueSize"),
        this.read("queueNotifyOff"),
      ]);
      return { sizeMax: isRingSize(sizeMax) ? sizeMax : 0, notifyOff };
    });
    return Promise.all(asked);
  }

  /** @throws VhostdError probeFailed where the doorbell lies outside the notification area */
  doorbell(queue: number, notifyOff: number): Doorbell {
    const { bar, offset, size, multiplier } = this.layout.notify;
    const at = notifyOff * multiplier;
    if (at + 2 > size) {
      throw new VhostdError(
        "probeFailed",
        `the doorbell of queue ${queue} of ${this.name} is at ${at} of ${size} bytes`,
      );
    }
    return this.fn.doorbell(bar, offset + at);
  }

  /**
   * Whether the page at the doorbell of a queue could be given away: the doorbell is at its begin, it lies wholly in the
   * notification area, and no other queue has its doorbell there.
   * @param pageSize bytes
   */
  ownsDoorbellPage(queue: number, limits: readonly QueueLimits[], pageSize: number): boolean {
    const { notify, common, device } = this.layout;
    const doorbellOf = (one: QueueLimits) => notify.offset + one.notifyOff * notify.multiplier;
    const limit = limits[queue];
    if (limit === undefined) return false;
    const start = doorbellOf(limit);
    const end = start + pageSize;
    if (start % pageSize !== 0 || end > notify.offset + notify.size) return false;
    const isInside = (at: number) => at >= start && at < end;
    if (limits.some((other, index) => index !== queue && other.sizeMax > 0 && isInside(doorbellOf(other))))
      return false;
    // A device may name the same registers twice.
    const others = [common, ...(device === null ? [] : [device])].filter(({ bar }) => bar === notify.bar);
    return !others.some(({ offset, size }) => offset < end && offset + size > start);
  }

  /**
   * Device configuration space, consistent (2.5.3). Bytes beyond what the device has are 0.
   * @throws VhostdError again where it changes all the time
   */
  async readConfig(length: number): Promise<Uint8Array> {
    const bytes = new Uint8Array(length);
    const { deviceConfig } = this;
    const place = this.layout.device;
    if (deviceConfig === undefined || place === null) return bytes;
    for (let tries = 0; tries < GENERATION_TRIES; tries++) {
      const [before, seen, after] = await Promise.all([
        this.read("configGeneration"),
        deviceConfig.readBytes(place.offset, Math.min(length, place.size)),
        this.read("configGeneration"),
      ]);
      if (before !== after) continue;
      this.configGeneration = after;
      bytes.set(seen);
      return bytes;
    }
    throw new VhostdError("again", `the configuration space of ${this.name} changed ${GENERATION_TRIES} times`);
  }

  /** Admin virtqueues, valid once ADMIN_VQ is negotiated (VIRTIO 1.3, 4.1.4.3); none where the device does not say. */
  async adminQueues(): Promise<{ readonly index: number; readonly count: number }> {
    if (this.layout.common.size < COMMON_CONFIG_SIZE) return { index: 0, count: 0 };
    const [index, count] = await Promise.all([this.read("adminQueueIndex"), this.read("adminQueueNum")]);
    return { index, count };
  }

  /** @throws VhostdError invalid where it lies outside what the device has */
  async writeConfig(offset: number, bytes: Uint8Array): Promise<void> {
    const { deviceConfig } = this;
    const place = this.layout.device;
    if (deviceConfig === undefined || place === null || offset < 0 || offset + bytes.length > place.size) {
      throw new VhostdError("invalid", `${bytes.length} bytes at ${offset} of a configuration of ${this.configLength}`);
    }
    await Promise.all([...bytes].map((byte, i) => deviceConfig.write(place.offset + offset + i, 1, byte)));
  }

  private async setUpQueue(queue: QueueState, total: number): Promise<void> {
    const what = `for queue ${queue.index}`;
    const results = await Promise.all([
      this.write("queueSelect", queue.index),
      this.write("queueSize", queue.size),
      this.writeAddress("queueDesc", queue.desc),
      this.writeAddress("queueDriver", queue.driver),
      this.writeAddress("queueDevice", queue.device),
      this.writeBack("queueVector", queue.vector, what, total),
      this.read("queueSize"),
      this.write("queueEnable", 1),
      this.read("queueEnable"),
    ]);
    const [size, enabled] = [results[6], results[8]];
    if (size !== queue.size || enabled !== 1) {
      const seen = `size ${size}, enabled ${enabled}, ${describeStatus(await this.status())}`;
      throw new VhostdError("notSupported", `${this.name} did not take queue ${queue.index} of ${queue.size}: ${seen}`);
    }
  }

  private async writeBack(
    register: "configVector" | "queueVector",
    vector: number,
    what: string,
    queues: number,
  ): Promise<void> {
    const [, seen] = await Promise.all([this.write(register, vector), this.read(register)]);
    if (seen === vector) return;
    const answer = seen === NO_VECTOR ? "none" : String(seen);
    throw new VhostdError("noVectors", `${this.name} gave ${answer} where vector ${vector} was asked ${what}`, {
      fix: `provision the function with ${queues + 1} MSI-X vectors: one for each queue and one more`,
    });
  }

  private async writeAddress(register: "queueDesc" | "queueDriver" | "queueDevice", address: number): Promise<void> {
    const [offset] = COMMON_CONFIG[register];
    const at = this.layout.common.offset + offset;
    await Promise.all([
      this.common.write(at, 4, address % 2 ** 32),
      this.common.write(at + 4, 4, Math.floor(address / 2 ** 32)),
    ]);
  }

  private read(register: Exclude<CommonRegister, AddressRegister>): Promise<number> {
    const [offset, type] = COMMON_CONFIG[register];
    return this.common.read(this.layout.common.offset + offset, fieldSize(type) as AccessWidth);
  }

  private write(register: Exclude<WritableCommonRegister, AddressRegister>, value: number): Promise<void> {
    const [offset, type] = COMMON_CONFIG[register];
    return this.common.write(this.layout.common.offset + offset, fieldSize(type) as AccessWidth, value);
  }

  private get name(): string {
    return this.fn.address;
  }
}

type AddressRegister = "queueDesc" | "queueDriver" | "queueDevice";

/** The bits that the function itself needs, whatever its guest negotiated: platform addressing, ring reset. */
export function ownFeatures(offered: bigint): bigint {
  return offered & ((1n << BigInt(FeatureBit.accessPlatform)) | (1n << BigInt(FeatureBit.ringReset)));
}

/** Device status for people (2.1). */
export function describeStatus(status: number): string {
  const names = Object.entries(Status).filter(([, bit]) => (status & bit) !== 0);
  return `status 0x${status.toString(16)} (${names.map(([name]) => name).join(", ")})`;
}
