import { VhostdError } from "../base/errors.ts";
import type { DeviceState } from "./device-state.ts";
import { FeatureBit, featureBits, Status } from "./features.ts";

/** The vector of configuration changes; that of queue n is n + 1. */
export const CONFIG_VECTOR = 0;
/** Bits that only the vhost-user protocol knows. */
const VHOST_BITS = featureBits(FeatureBit.vhostLogAll, FeatureBit.vhostUserProtocolFeatures);

/** What a function has, as far as a state can ask for it. */
export interface FunctionLimits {
  /** For messages. */
  readonly address: string;
  readonly queues: number;
  readonly vectors: number;
  /** All 64 feature bits that it offers. */
  readonly features: bigint;
  /** Those that are acknowledged whatever the guest negotiated. */
  readonly ownFeatures: bigint;
}

/**
 * What a session wants, with vectors, status and the feature bits that are the function's own matter.
 * @throws VhostdError invalid, noVectors
 */
export function completeState(wanted: DeviceState, limits: FunctionLimits): DeviceState {
  const { address, queues, vectors, features, ownFeatures } = limits;
  const last = Math.max(-1, ...wanted.queues.map(({ index }) => index));
  if (last >= queues) throw new VhostdError("invalid", `queue ${last} was asked for; ${address} has ${queues}`);
  const needed = last + 2;
  if (needed > vectors) {
    throw new VhostdError("noVectors", `${last + 1} queues need ${needed} MSI-X vectors; ${address} has ${vectors}`, {
      fix: "provision the function with more vectors, or give the guest fewer queues",
    });
  }
  return {
    ...wanted,
    features: (wanted.features & features & ~VHOST_BITS) | ownFeatures,
    status: Status.acknowledge | Status.driver | Status.featuresOk | Status.driverOk,
    configVector: CONFIG_VECTOR,
    queues: wanted.queues.map((queue) => ({ ...queue, vector: queue.index + 1 })),
  };
}
