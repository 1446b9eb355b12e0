import type { DmaRange } from "../pci/address-space.ts";
import type { DeviceClass } from "../plugin.ts";
import type { DeviceState } from "../virtio/device-state.ts";
import type { Tracking } from "../virtio/dirty-log.ts";
import type { FreezeMode } from "../virtio/mover.ts";
import type { RingMemory } from "../virtio/split-ring.ts";

/**
 * What a session drives: one VF, seen without its transport and life cycle. A process may die before it has noted what it
 * has done here, and the next one does it again: what is mapped, unmapped, started with the same state, reset or written
 * already is done then.
 */
export interface SessionTarget {
  readonly deviceClass: DeviceClass;
  /** All 64 feature bits that the function offers. */
  readonly deviceFeatures: bigint;
  /** Virtqueues a front-end may use. */
  readonly queues: number;
  /** The largest ring that the function takes for this queue, entries. */
  queueSizeMax(index: number): number;
  /** VHOST_F_LOG_ALL can be honoured at any moment from now on. */
  readonly dirtyTracking: boolean;
  /** The front-end is one that sets a device up before its VM has stopped elsewhere (PRESETUP), as the operator says. */
  readonly presetup: boolean;

  /** Device configuration space of the function, at most as long as the class's table says. */
  readConfig(): Promise<Uint8Array>;
  writeConfig(offset: number, bytes: Uint8Array): Promise<void>;

  /** Makes guest memory reachable for the function. The fd is borrowed for the call. */
  mapMemory(range: DmaRange, fd: number): Promise<void>;
  unmapMemory(range: DmaRange): Promise<void>;

  /**
   * Configures the function and lets it run: calls routed, kicks connected, every doorbell and every call rung once.
   * The fds are borrowed for the call.
   */
  start(wanted: DeviceState, eventfds: ReadonlyMap<number, RingEventfds>): Promise<void>;
  /** Brings the state into the function, which does not run: the start that follows changes only what is different then. */
  prepare(wanted: DeviceState): Promise<void>;
  /**
   * Each page that the function writes is marked from now on, whether it runs or not; undefined for no longer. Where log
   * or end are others than before, all pages of the new one are marked once. Only where `dirtyTracking`.
   * @param wanted its fd is borrowed for the call
   * @throws VhostdError where the function marks nothing, or not all, of what it writes
   */
  track(wanted: Tracking | undefined): Promise<void>;
  /** The function does not mark all that it writes any more. Replaces the earlier handler. */
  onTrackingLost(handler: (error: Error) => void): void;
  /** Disconnects the kicks and freezes the function. Indices, and what was marked, are final when it resolves. */
  stop(memory: RingMemory, mode: FreezeMode): Promise<DeviceState>;
  /** Status 0: nothing of the front-end is in use by the function any more. */
  reset(): Promise<void>;
  /**
   * As `reset`, for a front-end that is gone and may come back to rings in mid-use: where the function can go on from
   * them, it first gives back all that it has taken.
   */
  release(memory: RingMemory): Promise<void>;
  /**
   * From now on the running function uses exactly these of the queues that it was started with, and no others: kicks of
   * the others are disconnected (the eventfds are those of all of them, borrowed for the call).
   */
  enable(queues: ReadonlySet<number>, eventfds: ReadonlyMap<number, RingEventfds>, memory: RingMemory): Promise<void>;
  /** Changes the eventfd of one queue while the function runs; null disconnects. */
  setKick(queue: number, fd: number | null): Promise<void>;
  setCall(queue: number, fd: number | null): Promise<void>;

  /** Where the front-end may map the doorbell of a queue itself; left out where the transport cannot share one. */
  doorbellShare?(queue: number): Promise<DoorbellShare | undefined>;

  /** The function wants the front-end told that its configuration space changed. Replaces the earlier handler. */
  onConfigChange(handler: () => void): void;
  /** A front-end has come that means to use the function: what of a start can be done ahead is begun, where that is of use. */
  standBy(): void;
  /** Writes the VF's record to the keeper. Awaited before the front-end is answered. */
  checkpoint(): Promise<void>;
  /**
   * Has the keeper answer a message that lies in the session's connection, so that the death of this process leaves no doubt
   * whether it was answered. Left out where nobody can.
   * @param change of the record, which is written before
   */
  deliver?(delivery: Delivery, change: RecordChange): Promise<Delivered>;
}

/** What a message has changed of its VF's record: all may be different, or one fd of the session is another file. */
export type RecordChange = "nothing" | "all" | ReplacementFd;

export interface ReplacementFd {
  /** As it is stored. */
  readonly name: string;
  /** Borrowed. */
  readonly fd: number;
}

/** A message that is done with. */
export interface Delivery {
  /** Bytes of it, which lie in the connection. */
  readonly take: number;
  /** A whole message. */
  readonly reply: Uint8Array;
}

/**
 * What became of a delivery. `taken`: the message is not in the connection any more, and so many bytes of the reply were sent,
 * all of them mostly; `undone`: nothing was done but for the record; `unknown`: who was to do it is gone, and may have done it.
 */
export type Delivered =
  | { readonly kind: "taken"; readonly sent: number }
  | { readonly kind: "undone" }
  | { readonly kind: "unknown" };

/** The eventfds of one ring as they are now; undefined where the front-end gave none or the ring is disabled. */
export interface RingEventfds {
  readonly kick: number | undefined;
  readonly call: number | undefined;
}

/** A doorbell as the front-end maps it. Bytes; the fd is borrowed. */
export interface DoorbellShare {
  readonly fd: number;
  readonly offset: number;
  readonly size: number;
}
