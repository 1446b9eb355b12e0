import type { Deadline } from "../base/deadline.ts";
import type { DeviceClass } from "../plugin.ts";
import type { ControlQueue } from "./control-queue.ts";
import type { DeviceState } from "./device-state.ts";
import type { Tracking } from "./dirty-log.ts";
import type { QueueLimits, VirtioPciDevice } from "./pci-device.ts";
import type { RingMemory } from "./split-ring.ts";

/** What a mover can do, as data: the session offers only that. */
export interface MoverCapabilities {
  /** A stopped device can be started at any ring index, after a reset too. */
  readonly resumeAnywhere: boolean;
  /** The pages that the device writes can be marked: it was tried with this device. */
  readonly dirtyTracking: boolean;
}

/**
 * How a device is to be frozen. `drained`: everything that it has taken is given back, so that the indices say all.
 * `listed`: it may keep what it lists as in flight, because the same mover goes on from there.
 */
export type FreezeMode = "drained" | "listed";

/** Told of the steps of a stop, as each is done. */
export type StopNote = (step: "kicks_off" | "freeze") => void;

/** The device that a mover moves, and what was read of it when it was opened. */
export interface MoverHost {
  readonly device: VirtioPciDevice;
  /** All 64 feature bits that the function offers. */
  readonly features: bigint;
  readonly limits: readonly QueueLimits[];
  readonly deviceClass: DeviceClass;
  /** The function's own control queue, where it has one that can be driven; asked for when it is needed. */
  control(): ControlQueue | undefined;
  /** Rings the doorbell of a queue once. */
  ringDoorbell(queue: number): Promise<void>;
  /** Something that goes on all the same, and is worth a line in the log. */
  log(text: string): void;
}

/** Makes the mover of a device, from the snapshot of an earlier one or { kind: "reset" }. */
export type MoverFactory = (host: MoverHost, snapshot: MoverSnapshot) => StateMover;

/** Moves the state of one VF in and out of the device. */
export interface StateMover {
  readonly kind: "registers" | "vendor" | "standard";
  readonly capabilities: MoverCapabilities;
  /**
   * Brings the device to `wanted`, running. No doorbell has been rung when it returns.
   * @param connect connects what the device is to find connected when it runs; called before, at least once
   * @throws VhostdError where the device does not take it; the device is reset then
   */
  configure(wanted: DeviceState, deadline: Deadline, connect?: () => Promise<void>): Promise<void>;
  /**
   * Stops the device from using guest memory and returns its state, indices included. The caller has disconnected the
   * kicks.
   * @throws VhostdError timedOut where the device does not drain
   */
  freeze(memory: RingMemory, mode: FreezeMode, deadline: Deadline): Promise<DeviceState>;
  /**
   * From now on a running device uses exactly these of the queues that it was configured with; one that an operator holds
   * stays held. No doorbell has been rung when it returns.
   * @throws VhostdError where the device does not take it; notSupported where it cannot without a reset
   */
  enable(queues: ReadonlySet<number>, memory: RingMemory, deadline: Deadline): Promise<void>;
  /** Forgets everything: status 0, no queues. When it resolves the device uses no guest memory. */
  reset(deadline: Deadline): Promise<void>;
  /**
   * A start is to be expected: what of it can be done with a device that was reset is done now. Left out where there is
   * nothing.
   * @throws VhostdError where the device does not take it; a start is none the worse for that
   */
  standBy?(deadline: Deadline): Promise<void>;
  /**
   * Brings `wanted` into the device, which does not run, and leaves it standing: a `configure` that is told next changes
   * only what is different then. Left out where a device cannot stand still with a state.
   * @throws VhostdError where the device does not take it; the device is reset then
   */
  prepare?(wanted: DeviceState, deadline: Deadline): Promise<void>;
  /**
   * From now on each page that the device writes is marked in the log, in whatever state the device is; undefined for no
   * longer. Where the log or the end is another than before, all pages are marked in the new one once. When `freeze`
   * resolves everything is marked. Left out where `dirtyTracking` is false.
   * @param wanted its fd is borrowed for the call
   * @returns how the device marks, for people; undefined where it does not
   * @throws VhostdError where the device does not take it: it marks nothing, or not all, then
   */
  track?(wanted: Tracking | undefined, deadline: Deadline): Promise<string | undefined>;
  /** The device does not mark all that it writes any more. Once for each `track`; replaces the earlier handler. */
  onTrackingLost?(handler: (error: Error) => void): void;
  /**
   * Tries out, with a device that was just reset, what has to be seen before it is said that it can be done. Never rejects;
   * left out where there is nothing to try.
   */
  prove?(deadline: Deadline): Promise<void>;
  /** Lets go of everything of this process without a word to the device. Left out where there is nothing. */
  abandon?(): void;
  /** What an operator does by hand; left out where the device is moved by its registers only. */
  readonly manual?: ManualControl;
  /** Plain data for the record, and back. */
  snapshot(): MoverSnapshot;
}

/** The internal status of a managed device, by hand: for tests and for repair. */
export interface ManualControl {
  /** @throws VhostdError where the device cannot be asked */
  status(deadline: Deadline): Promise<"init" | "running" | "quiesced" | "freezed">;
  /** @throws VhostdError quiesceFailed, freezeFailed, adminQueue */
  change(to: "running" | "quiesced" | "freezed", deadline: Deadline): Promise<void>;
}

export type MoverSnapshot = (
  | { readonly kind: "reset" }
  | { readonly kind: "running" | "frozen"; readonly state: EncodedDeviceState }
) & {
  /** How the device marks the pages that it writes, where it was tried; the mover's own word. */
  readonly tracking?: string;
};

/** DeviceState as JSON: features in hex, config in base64. */
export interface EncodedDeviceState {
  readonly features: string;
  readonly status: number;
  readonly configVector: number;
  readonly config: string;
  readonly queues: DeviceState["queues"];
}
