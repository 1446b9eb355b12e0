import type { Deadline } from "../base/deadline.ts";
import type { DeviceState } from "./device-state.ts";
import type { RingMemory } from "./split-ring.ts";

/** What a mover can do, as data: the session offers only that. */
export interface MoverCapabilities {
  /** A stopped device can be started at any ring index, after a reset too. */
  readonly resumeAnywhere: boolean;
  /** The pages that the device writes can be logged. */
  readonly dirtyTracking: boolean;
}

/** Moves the state of one VF in and out of the device. */
export interface StateMover {
  readonly kind: "registers" | "vendor" | "standard";
  readonly capabilities: MoverCapabilities;
  /**
   * Brings the device to `wanted`, running. No doorbell has been rung when it returns.
   * @throws VhostdError where the device does not take it; the device is reset then
   */
  configure(wanted: DeviceState, deadline: Deadline): Promise<void>;
  /**
   * Stops the device from using guest memory and returns its state, indices included: every buffer it has taken is
   * written back. The caller has disconnected the kicks.
   * @throws VhostdError timedOut where the device does not drain
   */
  freeze(memory: RingMemory, deadline: Deadline): Promise<DeviceState>;
  /** Forgets everything: status 0, no queues. */
  reset(deadline: Deadline): Promise<void>;
  /** Plain data for the record, and back. */
  snapshot(): MoverSnapshot;
}

export type MoverSnapshot =
  | { readonly kind: "reset" }
  | { readonly kind: "running" | "frozen"; readonly state: EncodedDeviceState };

/** DeviceState as JSON: features in hex, config in base64. */
export interface EncodedDeviceState {
  readonly features: string;
  readonly status: number;
  readonly configVector: number;
  readonly config: string;
  readonly queues: DeviceState["queues"];
}
