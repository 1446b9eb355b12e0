import { asError } from "../../src/base/errors.ts";
import type { OwnedFd } from "../../src/native/fd.ts";
import { watch } from "../../src/native/poller.ts";
import { drainEventfd, eventfd, signalEventfd } from "../../src/native/sys.ts";
import {
  DESCRIPTOR,
  DescriptorFlag,
  descSize,
  deviceSize,
  driverSize,
  RING,
  usedIndex,
} from "../../src/virtio/split-ring.ts";
import type { RawBuffer } from "./driver-ring.ts";
import type { DriverMemory } from "./guest-memory-file.ts";

/** A chain that the device gave back. */
export interface Returned {
  readonly head: number;
  /** Bytes that the device says it has written. */
  readonly length: number;
}

const PAGE = 4096;
const { next } = DescriptorFlag;

/**
 * The driver side of a split queue for very many requests where every system call counts: its chains are laid out once, then
 * made available and taken back in batches. Neither EVENT_IDX nor INDIRECT_DESC may be negotiated.
 */
export class PreparedQueue implements Disposable {
  readonly kick: OwnedFd = eventfd();
  /** In the shape that a front-end tells of. */
  readonly driver: { readonly ring: Record<"size" | "desc" | "driver" | "device", number>; readonly call: OwnedFd };
  /** Where buffers may begin. */
  readonly end: number;
  /** Signals of the call eventfd seen. */
  calls = 0;
  private readonly watch;
  private readonly available: Uint16Array;
  private descriptors = 0;
  private published = 0;
  private used = 0;
  private failed: Error | undefined;

  /**
   * @param base of the ring, a multiple of 4096
   * @param onReturned is given the chains of each call. What it throws is the queue's failure.
   */
  constructor(
    readonly index: number,
    private readonly memory: DriverMemory,
    base: number,
    size: number,
    private readonly onReturned: (returned: readonly Returned[]) => void,
  ) {
    const driver = base + descSize(size);
    const device = Math.ceil((driver + driverSize(size)) / 4) * 4;
    this.end = Math.ceil((device + deviceSize(size)) / PAGE) * PAGE;
    this.available = new Uint16Array(size);
    this.driver = { ring: { size, desc: base, driver, device }, call: eventfd() };
    memory.write(base, new Uint8Array(this.end - base));
    this.watch = watch(this.driver.call.number, "in", () => this.onCall());
  }

  /** What ended it: the device broke the ring, or `onReturned` threw. Nothing is taken back any more. */
  get failure(): Error | undefined {
    return this.failed;
  }

  /** Lays out a chain in descriptors of its own. @throws RangeError where they are used up */
  chain(buffers: readonly RawBuffer[]): number {
    const head = this.descriptors;
    this.descriptors += buffers.length;
    const { size, desc } = this.driver.ring;
    if (this.descriptors > size) throw new RangeError(`a ring of ${size} entries is full`);
    for (const [at, buffer] of buffers.entries()) {
      const last = at + 1 === buffers.length;
      const flags = last ? buffer.flags : buffer.flags | next;
      const bytes = DESCRIPTOR.encode({ ...buffer, flags, next: last ? 0 : head + at + 1 });
      this.memory.write(desc + descSize(head + at), bytes);
    }
    return head;
  }

  /** Changes the length of a chain of one buffer. */
  resize(head: number, length: number): void {
    this.memory.write(this.driver.ring.desc + descSize(head) + 8, new Uint8Array(Uint32Array.of(length).buffer));
  }

  /** Makes chains available, all at once, and kicks. */
  publish(heads: readonly number[]): void {
    if (heads.length === 0) return;
    const { size, driver } = this.driver.ring;
    for (const head of heads) {
      this.available[this.published % size] = head;
      this.published = (this.published + 1) & 0xffff;
    }
    this.memory.write(driver + RING.entries, new Uint8Array(this.available.buffer));
    this.memory.write(driver + RING.index, Uint8Array.of(this.published & 0xff, this.published >> 8));
    signalEventfd(this.kick.number);
  }

  [Symbol.dispose](): void {
    this.watch[Symbol.dispose]();
    this.driver.call[Symbol.dispose]();
    this.kick[Symbol.dispose]();
  }

  private onCall(): void {
    this.calls += drainEventfd(this.driver.call.number);
    this.watch.rearm();
    if (this.failed !== undefined) return;
    try {
      const returned = this.collect();
      if (returned.length > 0) this.onReturned(returned);
    } catch (error) {
      this.failed = asError(error);
    }
  }

  private collect(): Returned[] {
    const { size, device } = this.driver.ring;
    const index = usedIndex(this.memory, this.driver.ring);
    const bytes = this.memory.read(device, deviceSize(size));
    const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    const count = (index - this.used) & 0xffff;
    if (count > size) throw new Error(`the device gave ${count} chains back, of ${size}`);
    const from = this.used;
    this.used = index;
    return Array.from({ length: count }, (_, at) => {
      const place = RING.entries + 8 * (((from + at) & 0xffff) % size);
      return { head: view.getUint32(place, true), length: view.getUint32(place + 4, true) };
    });
  }
}
