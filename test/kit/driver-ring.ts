import { FeatureBit, hasFeature } from "../../src/virtio/features.ts";
import {
  DescriptorFlag,
  descSize,
  deviceSize,
  driverSize,
  RING_ALIGNMENT,
  readSteady16,
} from "../../src/virtio/split-ring.ts";
import { Arena } from "./arena.ts";
import type { DriverMemory } from "./guest-memory-file.ts";

export interface DriverRingOptions {
  readonly memory: DriverMemory;
  /** Where the ring and its buffers begin; 4096-aligned. */
  readonly base: number;
  /** Entries. */
  readonly size: number;
  /** Negotiated feature word: RING_INDIRECT_DESC and RING_EVENT_IDX are heeded. */
  readonly features: bigint;
  /** Bytes for buffers and indirect tables behind the ring. 1 MiB unless said. */
  readonly bufferSpace?: number;
  /** Where both indices begin: a ring that has been in use. 0 unless said. */
  readonly firstIndex?: number;
}

/** A chain that was made available. */
export interface Submitted {
  /** Names the chain in its completion. */
  readonly head: number;
  /** The device wants to be notified (VIRTIO 1.2, 2.7.10). */
  readonly notify: boolean;
}

/** A chain that the device gave back. */
export interface Completed {
  readonly head: number;
  /** Bytes that the device says it has written. */
  readonly length: number;
  /** Contents of the device-writable buffers, each in full. */
  readonly written: readonly Uint8Array[];
}

/** One buffer of a chain that is built by hand. */
export type RawBuffer = Omit<RawDescriptor, "next">;

/** A raw descriptor, for tests that build bad chains (2.7.5). */
export interface RawDescriptor {
  readonly address: number;
  readonly length: number;
  readonly flags: number;
  readonly next: number;
}

interface InFlight {
  readonly descriptors: readonly number[];
  readonly writable: readonly { readonly address: number; readonly length: number }[];
  readonly taken: readonly number[];
}

/**
 * The driver side of a split virtqueue (VIRTIO 1.2, 2.7), device class unknown. It neither waits nor notifies: the
 * owner rings the doorbell when `submit` says so and asks for completions when the call comes.
 */
export class DriverRing {
  readonly size: number;
  /** Guest-physical addresses of descriptor table, available ring and used ring. */
  readonly desc: number;
  readonly driver: number;
  readonly device: number;
  /** Buffers of the chains come from here; tests take theirs from it too. */
  readonly arena: Arena;

  private readonly memory: DriverMemory;
  private readonly indirect: boolean;
  private readonly eventIdx: boolean;
  private readonly freeDescriptors: number[];
  private readonly inFlight = new Map<number, InFlight>();
  private available: number;
  private used: number;

  constructor(options: DriverRingOptions) {
    this.memory = options.memory;
    this.size = options.size;
    this.indirect = hasFeature(options.features, FeatureBit.ringIndirectDesc);
    this.eventIdx = hasFeature(options.features, FeatureBit.ringEventIdx);
    this.available = this.used = options.firstIndex ?? 0;
    this.freeDescriptors = Array.from({ length: this.size }, (_, index) => this.size - 1 - index);

    this.desc = options.base;
    this.driver = align(this.desc + descSize(this.size), RING_ALIGNMENT.driver);
    this.device = align(this.driver + driverSize(this.size), RING_ALIGNMENT.device);
    const end = align(this.device + deviceSize(this.size), 4096);
    this.arena = new Arena(end, options.bufferSpace ?? 1 << 20);
    this.memory.write(this.desc, new Uint8Array(end - this.desc));
    this.write16(this.driver + 2, this.available);
    this.write16(this.device + 2, this.used);
    if (this.eventIdx) this.write16(this.usedEventAddress, this.used);
  }

  /** Bytes that a ring takes from its base on, buffers included. */
  static span(size: number, bufferSpace = 1 << 20): number {
    return align(descSize(size) + driverSize(size) + deviceSize(size) + 8, 4096) + bufferSpace;
  }

  /** Chains that the device has not given back. */
  get pending(): number {
    return this.inFlight.size;
  }

  /** Descriptors that are free; an indirect chain takes one. */
  get room(): number {
    return this.freeDescriptors.length;
  }

  /**
   * Makes a chain of copies of `readable` and buffers of the sizes `writable` available.
   * @throws RangeError where descriptors or buffer space are used up
   */
  submit(readable: readonly Uint8Array[], writable: readonly number[]): Submitted {
    const taken: number[] = [];
    const take = (length: number) => {
      const address = this.arena.take(length);
      taken.push(address);
      return { address, length };
    };
    const sources = readable.map((bytes) => {
      const place = take(bytes.length);
      this.memory.write(place.address, bytes);
      return place;
    });
    const targets = writable.map(take);
    const chain = [
      ...sources.map((place) => ({ ...place, flags: 0 })),
      ...targets.map((place) => ({ ...place, flags: DescriptorFlag.write })),
    ];
    const descriptors = this.place(chain, taken);
    const head = descriptors[0]!;
    this.inFlight.set(head, { descriptors, writable: targets, taken });
    return { head, notify: this.makeAvailable(head) };
  }

  /** The same with buffers anywhere and flags as they are, links added; nothing is copied in or out. */
  submitRaw(buffers: readonly RawBuffer[]): Submitted {
    const descriptors = this.place(buffers, [], false);
    const head = descriptors[0]!;
    this.inFlight.set(head, { descriptors, writable: [], taken: [] });
    return { head, notify: this.makeAvailable(head) };
  }

  /** Chains that came back since the last call. Asks for a call at the next one (EVENT_IDX). */
  completions(): Completed[] {
    const completed: Completed[] = [];
    for (;;) {
      const index = this.read16(this.device + 2);
      while (this.used !== index) {
        completed.push(this.take(this.used % this.size));
        this.used = (this.used + 1) & 0xffff;
      }
      if (!this.eventIdx) return completed;
      this.write16(this.usedEventAddress, this.used);
      fence();
      if (this.read16(this.device + 2) === this.used) return completed;
    }
  }

  /** Writes a descriptor as it is; for bad chains. */
  writeDescriptor(index: number, descriptor: RawDescriptor, table = this.desc): void {
    this.memory.write(table + 16 * index, encodeDescriptor(descriptor));
  }

  /** Puts any head into the available ring and publishes it. @returns whether the device wants to be notified */
  makeAvailable(head: number): boolean {
    this.write16(this.driver + 4 + 2 * (this.available % this.size), head);
    const before = this.available;
    this.available = (this.available + 1) & 0xffff;
    this.write16(this.driver + 2, this.available);
    fence();
    if (!this.eventIdx) return (this.read16(this.device) & 1) === 0;
    const event = this.read16(this.device + 4 + 8 * this.size);
    return ((this.available - event - 1) & 0xffff) < ((this.available - before) & 0xffff);
  }

  /** Sets the available index; for bad rings. */
  setAvailableIndex(index: number): void {
    this.available = index & 0xffff;
    this.write16(this.driver + 2, this.available);
  }

  /** Calls may be left out from now on (flags without EVENT_IDX, else no new used_event). */
  suppressCalls(suppress: boolean): void {
    this.write16(this.driver, suppress ? 1 : 0);
  }

  private get usedEventAddress(): number {
    return this.driver + 4 + 2 * this.size;
  }

  private place(chain: readonly RawBuffer[], taken: number[], mayBeIndirect = true): number[] {
    const indirect = this.indirect && mayBeIndirect && chain.length > 1;
    const needed = indirect ? 1 : chain.length;
    if (needed === 0) throw new RangeError("a chain needs at least one buffer");
    if (needed > this.freeDescriptors.length) {
      for (const address of taken) this.arena.give(address);
      throw new RangeError(`the chain needs ${needed} descriptors, ${this.freeDescriptors.length} are free`);
    }
    const descriptors = this.freeDescriptors.splice(-needed);
    if (!indirect) {
      for (const [position, part] of chain.entries()) {
        this.writeDescriptor(descriptors[position]!, linked(part, descriptors[position + 1]));
      }
      return descriptors;
    }
    const table = this.arena.take(16 * chain.length);
    taken.push(table);
    for (const [position, part] of chain.entries()) {
      this.writeDescriptor(position, linked(part, position + 1 < chain.length ? position + 1 : undefined), table);
    }
    const length = 16 * chain.length;
    this.writeDescriptor(descriptors[0]!, { address: table, length, flags: DescriptorFlag.indirect, next: 0 });
    return descriptors;
  }

  private take(slot: number): Completed {
    const element = new DataView(this.memory.read(this.device + 4 + 8 * slot, 8).slice().buffer);
    const head = element.getUint32(0, true);
    const entry = this.inFlight.get(head);
    if (entry === undefined) {
      const where = `at used index ${this.used} of a ring at 0x${this.device.toString(16)}, used up to ${this.read16(this.device + 2)}`;
      throw new Error(`the device gave back chain ${head}, which is not in flight, ${where}`);
    }
    this.inFlight.delete(head);
    const written = entry.writable.map(({ address, length }) => this.memory.read(address, length));
    for (const address of entry.taken) this.arena.give(address);
    this.freeDescriptors.push(...entry.descriptors);
    return { head, length: element.getUint32(4, true), written };
  }

  private read16(gpa: number): number {
    return readSteady16(this.memory, gpa);
  }

  private write16(gpa: number, value: number): void {
    this.memory.write(gpa, Uint8Array.of(value & 0xff, (value >> 8) & 0xff));
  }
}

function linked(part: RawBuffer, next: number | undefined): RawDescriptor {
  return next === undefined ? { ...part, next: 0 } : { ...part, flags: part.flags | DescriptorFlag.next, next };
}

function encodeDescriptor({ address, length, flags, next }: RawDescriptor): Uint8Array {
  const view = new DataView(new ArrayBuffer(16));
  view.setBigUint64(0, BigInt(address), true);
  view.setUint32(8, length, true);
  view.setUint16(12, flags, true);
  view.setUint16(14, next, true);
  return new Uint8Array(view.buffer);
}

function align(value: number, alignment: number): number {
  return Math.ceil(value / alignment) * alignment;
}

const fenceWord = new Int32Array(new SharedArrayBuffer(4));
/** A locked instruction: the index written before is visible before the event read after (2.7.13.4.1). */
function fence(): void {
  Atomics.add(fenceWord, 0, 1);
}
