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

/** What others do while a device is started. */
export interface StartSteps {
  /** Connects what the device is to find connected when it runs; called before, at least once. */
  readonly connect?: () => Promise<void>;
  /** Writes the record, in which the mover is "starting" then; it has resolved before the device may run. */
  readonly note?: () => Promise<void>;
}

/** How the device of an earlier process is to be taken up. */
export interface TakeUp {
  /** An operator holds the internal status: it is left as it is. */
  readonly held: boolean;
  /** As of StartSteps. */
  readonly connect?: () => Promise<void>;
}

/** `reset`: by the record it was set up, and it does not go on from there: it is at rest, with nothing. */
export type TakenUp = "asRecorded" | "reset";

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
  /** The device does not go on; it works again after a reset. */
  failed(error: Error): void;
}

/** Makes the mover of a device, from the snapshot of an earlier one or { kind: "reset" }. */
export type MoverFactory = (host: MoverHost, snapshot: MoverSnapshot) => StateMover;

/** Moves the state of one VF in and out of the device. */
export interface StateMover {
  readonly kind: "registers" | "vendor" | "standard";
  readonly capabilities: MoverCapabilities;
  /**
   * Brings the device to `wanted`, running. No doorbell has been rung when it returns.
   * @throws VhostdError where the device does not take it; the device is reset then
   */
  configure(wanted: DeviceState, deadline: Deadline, steps?: StartSteps): Promise<void>;
  /**
   * Looks at the device of an earlier process, which may have died in the middle of anything: once, after the mover was
   * made from its snapshot and before anything else is asked of it. What was "starting" runs or is reset afterwards, which
   * `snapshot` tells; both are "asRecorded". A device that should run and stands still goes on. One that nobody can ask
   * is taken as it was recorded.
   * @throws VhostdError resetTimedOut where it has to be reset and does not come to rest
   */
  takeUp(deadline: Deadline, how: TakeUp): Promise<TakenUp>;
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

/** `starting`: it may run with that state, or not yet; see StateMover.takeUp. */
export type MoverSnapshot = (
  | { readonly kind: "reset" }
  | { readonly kind: "starting" | "running" | "frozen"; readonly state: EncodedDeviceState }
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
