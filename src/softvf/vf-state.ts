import { VhostdError } from "../base/errors.ts";
import type { RingConfig } from "../native/ring-engine.ts";
import type { OpaqueField, VendorState } from "../virtio/admin/state-blob.ts";
import { FeatureBit, hasFeature, Status } from "../virtio/features.ts";
import { NO_VECTOR } from "../virtio/registers.ts";
import { isRingSize } from "../virtio/split-ring.ts";
import type { DeviceRegisters, DriverState, QueueRegisters } from "./device-registers.ts";

/** A state that fits a device: what its registers are to be, and where its rings go on. */
export interface RestoredState {
  readonly state: DriverState;
  readonly generation: number;
  /** All queues of the device. */
  readonly queues: readonly QueueRegisters[];
  readonly rings: ReadonlyMap<number, RingConfig>;
  readonly config: Uint8Array;
  /** Those of the class, and what else there is. */
  readonly fields: readonly OpaqueField[];
}

/** What of a device limits the states that it can take. */
export type StateLimits = Pick<DeviceRegisters, "features" | "ringSize"> & {
  readonly queues: number;
  readonly vectors: number;
};

const STATUS_BITS = Object.values(Status).reduce((bits, bit) => bits | bit, 0);

/**
 * The state of a device as the vendor's commands carry it: all queues, enabled or not.
 * @param saved what the class adds
 * @param lists whether chains in flight are listed
 */
export function describeState(
  registers: DeviceRegisters,
  rings: ReadonlyMap<number, RingConfig>,
  { config, fields }: Pick<VendorState, "config"> & { readonly fields: readonly OpaqueField[] },
  lists: boolean,
): VendorState {
  const { status, deviceFeatureSelect, driverFeatureSelect, driverFeatures, configVector, queueSelect } =
    registers.state;
  const inFlight = [...rings].map(([queue, ring]) => ({ queue, heads: ring.inFlight ?? [] }));
  return {
    common: {
      deviceFeatureSelect,
      deviceFeatures: registers.features,
      driverFeatureSelect,
      driverFeatures,
      configVector,
      numQueues: registers.queues.length,
      queueSelect,
      status,
      configGeneration: registers.generation,
    },
    config,
    queues: registers.queues.map(({ size, vector, enabled, desc, driver, device }, index) => {
      const enable = enabled ? 1 : 0;
      return { index, size, vector, enable, notifyOff: index, desc, driver, device, notifyData: index, reset: 0 };
    }),
    indices: [...rings].map(([index, { lastAvail, lastUsed }]) => ({ index, lastAvail, lastUsed })),
    inFlight: lists ? inFlight.filter(({ heads }) => heads.length > 0) : [],
    completed: [],
    others: fields,
  };
}

/**
 * The one place where a state from outside is held against the device: features, status, vectors, then each queue.
 * Where rings lie and which heads are in flight is checked by the engine, which knows the memory.
 * @throws VhostdError invalid with the reason
 */
export function checkState(from: VendorState, limits: StateLimits): RestoredState {
  const { common } = from;
  checkFeatures(common.driverFeatures, limits.features);
  checkStatus(common.status, common.driverFeatures);
  checkVector("configuration", common.configVector, limits.vectors);
  if (common.numQueues > limits.queues) throw refuse(`it has ${common.numQueues} queues; the device ${limits.queues}`);

  const queues: QueueRegisters[] = Array.from({ length: limits.queues }, () => ({
    size: limits.ringSize,
    vector: NO_VECTOR,
    enabled: false,
    desc: 0n,
    driver: 0n,
    device: 0n,
  }));
  for (const { index, size, vector, enable, notifyOff, desc, driver, device } of from.queues) {
    if (index >= limits.queues) throw refuse(`it has a queue ${index}; the device ${limits.queues} queues`);
    if (enable > 1) throw refuse(`queue ${index} has enable ${enable}; 0 or 1`);
    checkVector(`queue ${index}`, vector, limits.vectors);
    queues[index] = { size, vector, enabled: enable === 1, desc, driver, device };
    if (enable === 0) continue;
    if ((common.status & Status.featuresOk) === 0) throw refuse(`queue ${index} is enabled before FEATURES_OK`);
    if (!isRingSize(size) || size > limits.ringSize) {
      throw refuse(`queue ${index} has size ${size}; a power of two up to ${limits.ringSize}`);
    }
    if (notifyOff !== index) throw refuse(`queue ${index} has notify_off ${notifyOff}; the device's is ${index}`);
  }
  return {
    state: {
      status: common.status,
      deviceFeatureSelect: common.deviceFeatureSelect,
      driverFeatureSelect: common.driverFeatureSelect,
      driverFeatures: common.driverFeatures,
      configVector: common.configVector,
      queueSelect: common.queueSelect,
    },
    generation: common.configGeneration,
    queues,
    rings: checkRings(from, queues),
    config: from.config,
    fields: from.others,
  };
}

function checkRings(from: VendorState, queues: readonly QueueRegisters[]): Map<number, RingConfig> {
  const enabled = (index: number) => queues[index]?.enabled === true;
  for (const { queue, heads } of from.completed) {
    if (heads.length > 0) throw refuse(`queue ${queue} lists completed chains, which the device does not take`);
  }
  for (const { queue, heads } of from.inFlight) {
    if (heads.length > 0 && !enabled(queue)) throw refuse(`queue ${queue} lists chains in flight and is not enabled`);
  }
  const rings = new Map<number, RingConfig>();
  for (const [index, { enabled: use, size, desc, driver, device }] of queues.entries()) {
    if (!use) continue;
    const { lastAvail, lastUsed } = from.indices.find((each) => each.index === index) ?? { lastAvail: 0, lastUsed: 0 };
    const inFlight = from.inFlight.find(({ queue }) => queue === index)?.heads ?? [];
    const taken = (lastAvail - lastUsed) & 0xffff;
    if (taken !== inFlight.length) {
      throw refuse(
        `queue ${index} has ${taken} chains in flight (last_avail ${lastAvail}, last_used ${lastUsed}) and lists ${inFlight.length}`,
      );
    }
    rings.set(index, { size, desc, driver, device, lastAvail, lastUsed, inFlight });
  }
  return rings;
}

function checkFeatures(driver: bigint, offered: bigint): void {
  const unknown = driver & ~offered;
  if (unknown !== 0n) throw refuse(`feature bits 0x${unknown.toString(16)} are not offered by the device`);
}

function checkStatus(status: number, driverFeatures: bigint): void {
  const { featuresOk, driverOk } = Status;
  if ((status & ~STATUS_BITS) !== 0) throw refuse(`its status 0x${status.toString(16)} has bits that mean nothing`);
  if ((status & driverOk) !== 0 && (status & featuresOk) === 0) throw refuse("it has DRIVER_OK without FEATURES_OK");
  if ((status & featuresOk) !== 0 && !hasFeature(driverFeatures, FeatureBit.version1)) {
    throw refuse("its driver did not accept VERSION_1");
  }
}

function checkVector(what: string, vector: number, vectors: number): void {
  if (vector === NO_VECTOR || vector < vectors) return;
  throw refuse(`its vector for ${what} is ${vector}; the device has ${vectors}`);
}

function refuse(why: string): VhostdError {
  return new VhostdError("invalid", `the device state does not fit: ${why}`);
}
