import { VhostdError } from "../base/errors.ts";
import type { DeviceState, QueueState } from "../virtio/device-state.ts";
import { FeatureBit, hasFeature, Status } from "../virtio/features.ts";
import { usedIndex } from "../virtio/split-ring.ts";
import { functionFeatures } from "./features.ts";
import type { GuestMemory } from "./guest-memory.ts";
import type { Ring } from "./rings.ts";
import type { SessionTarget } from "./target.ts";

/** What a function is told of the rings that a front-end has set up. */

/** The status that a driver has written when its device may run (VIRTIO 1.2, 3.1.1). */
const RUNNING_STATUS = Status.acknowledge | Status.driver | Status.driverOk | Status.featuresOk;

/** @throws VhostdError notSupported where `features`, as acknowledged, are those of a legacy driver */
export function checkModern(features: bigint): void {
  if (hasFeature(features, FeatureBit.version1)) return;
  throw new VhostdError(
    "notSupported",
    `the guest's driver has not acknowledged VERSION_1 (features 0x${features.toString(16)}), legacy devices are not served`,
    { fix: "start the VMM's device with disable-legacy=on,disable-modern=off" },
  );
}

/** @param config as the function has it */
export function wantedState(
  target: SessionTarget,
  features: bigint,
  config: Uint8Array,
  queues: readonly QueueState[],
): DeviceState {
  return { features: functionFeatures(features, target), status: RUNNING_STATUS, configVector: 0, config, queues };
}

/**
 * A ring that is to run now.
 * @param inFlight what the function keeps of it since it was stopped
 * @throws VhostdError where it was not set up completely
 */
export function startedQueue(
  ring: Ring,
  memory: GuestMemory,
  used: boolean,
  inFlight: readonly number[] | undefined,
): QueueState {
  const addresses = ring.ready(memory);
  const lastUsed = usedIndex(memory, addresses);
  return {
    ...queueOf(ring, used),
    ...addresses,
    lastAvail: inFlight === undefined ? resumeIndex(ring.base, lastUsed, ring.size) : ring.base,
    lastUsed,
    ...(inFlight === undefined ? {} : { inFlight }),
  };
}

/**
 * A ring that is to run later, where its VM still runs elsewhere: what its memory holds is of no use yet, and nothing is in
 * flight.
 * @throws VhostdError where it was not set up completely
 */
export function preparedQueue(ring: Ring, memory: GuestMemory): QueueState {
  const addresses = ring.ready(memory);
  return { ...queueOf(ring, ring.enabled), ...addresses, lastAvail: ring.base, lastUsed: ring.base };
}

function queueOf({ index, size }: Ring, used: boolean) {
  return { index, size, vector: index + 1, ...(used ? {} : { disabled: true as const }) };
}

/**
 * Where a ring goes on. A front-end that lost its connection has noted the used index of that moment, and what was in
 * flight has been given back since.
 */
function resumeIndex(base: number, used: number, size: number): number {
  const givenBackSince = (used - base) & 0xffff;
  return givenBackSince <= size ? used : base;
}
