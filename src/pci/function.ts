import type { Deadline } from "../base/deadline.ts";
import type { Json } from "../base/json.ts";
import type { PciAddress } from "./address.ts";

/**
 * One PCI function as its driver sees it, reached through a transport (kernel VFIO or vfio-user). Register accesses
 * are promises on both, because one of them crosses a socket; accesses are carried out in the order they were made,
 * so a driver may issue several and await them together.
 */
export interface PciFunction extends AsyncDisposable {
  readonly address: PciAddress;
  /** PCI configuration space. */
  readonly config: RegisterSpace;
  readonly interrupts: Interrupts;
  /**
   * A base address register's space, 0 to 5.
   * @throws VhostdError barRead where the function has none at this index
   */
  region(bar: number): RegisterSpace;
  /**
   * The place that a driver writes to announce buffers of a queue. The function owns it.
   * @throws VhostdError barRead where it lies outside the region
   */
  doorbell(bar: number, offset: number): Doorbell;
  /** Function-level reset. @throws VhostdError resetTimedOut */
  reset(deadline: Deadline): Promise<void>;
  /** What each queue has done since the function was made; left out where the function does not count. */
  readonly queueStats?: (() => Promise<readonly QueueStats[]>) | undefined;
  /** Resolves with the reason when the function is gone (its server died, the device was unplugged). */
  readonly lost: Promise<Error>;
  /** What a new process needs, beside the fds, to go on with the function as it is. */
  snapshot(): FunctionSnapshot;
  /**
   * Lets go of everything of this process without touching the function: it stays open, mapped and running for
   * whoever holds duplicates of its fds.
   */
  abandon(): void;
}

/** Counters of one virtqueue. */
export interface QueueStats {
  /** Descriptor chains that the device has taken. */
  readonly received: number;
  /** Descriptor chains that it has given back. */
  readonly completed: number;
  /** Of these, how many were malformed or failed. */
  readonly bad: number;
  /** Data moved, without headers and status bytes. */
  readonly bytes: number;
}

/** Plain data beside named fds: a live function is made from both (first start and adoption alike). */
export interface FunctionSnapshot {
  readonly data: Json;
  /** Borrowed: they belong to the function. */
  readonly fds: ReadonlyMap<string, number>;
}

export type AccessWidth = 1 | 2 | 4;

/** Registers by offset and width in bytes. */
export interface RegisterSpace {
  /** Bytes. */
  readonly size: number;
  read(offset: number, width: AccessWidth): Promise<number>;
  write(offset: number, width: AccessWidth, value: number): Promise<void>;
  /** `length` bytes; not atomic over more than 4 of them. */
  readBytes(offset: number, length: number): Promise<Uint8Array>;
}

export interface Interrupts {
  /** MSI-X vectors of the function. */
  readonly count: number;
  /**
   * The device signals `eventfd` for `vector` from now on; null routes it nowhere. Other vectors are not disturbed.
   * The fd is borrowed for the call.
   */
  route(vector: number, eventfd: number | null): Promise<void>;
}

export interface Doorbell {
  /** Rings once, from this process. `value` is the queue index, or its notify data. */
  ring(value: number): Promise<void>;
  /**
   * From now on each signal of `kick` rings the doorbell, without passing through JavaScript, until the connection
   * is disposed of. A kick that was signalled before counts. The fd is borrowed for the call.
   * @throws VhostdError notSupported where only `ring` can reach the doorbell
   */
  connect(kick: number, value: number): Disposable;
  /**
   * The function itself waits on `kick` from now on, after the death of this process too; null ends that. A kick that
   * was signalled before counts. The fd is borrowed for the call. Left out where the function cannot.
   */
  readonly takeKick?: ((kick: number | null) => Promise<void>) | undefined;
  /** Where a front-end may map the doorbell itself (host notifier), or undefined. */
  readonly page: DoorbellPage | undefined;
  /**
   * The same with its file, for giving it away: who has the fd may be able to do more with the function than to map it, and
   * the function is prepared for that from now on. The fd is borrowed.
   */
  share(): (DoorbellPage & { readonly fd: number }) | undefined;
}

/** Where in a file a doorbell is mapped. Bytes; page-aligned. */
export interface DoorbellPage {
  readonly offset: number;
  readonly size: number;
}
