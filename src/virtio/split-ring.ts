import { struct } from "../base/layout.ts";

/** The split virtqueue's layout in guest memory (VIRTIO 1.2, 2.7). Bytes and guest-physical addresses. */

/** Guest memory as the daemon reads it: ring indices only, never data. */
export interface RingMemory {
  /** @throws VhostdError badAddress where the range is not wholly inside one region, or the region's file is shorter */
  read(gpa: number, length: number): Uint8Array;
}

/** Largest ring, entries (2.7). */
export const RING_SIZE_MAX = 32768;

/** Alignment of the three parts (2.7). */
export const RING_ALIGNMENT = { desc: 16, driver: 2, device: 4 } as const;

/** Descriptor flags (2.7.5). */
export const DescriptorFlag = { next: 0x1, write: 0x2, indirect: 0x4 } as const;

/** struct virtq_desc (2.7.5) and virtq_used_elem (2.7.8). */
export const DESCRIPTOR = struct("descriptor", 16, {
  address: [0, "addr"],
  length: [8, "u32"],
  flags: [12, "u16"],
  next: [14, "u16"],
});
export const USED_ELEMENT = struct("used element", 8, { id: [0, "u32"], length: [4, "u32"] });

/** Offsets in both rings, which begin with `flags u16, idx u16`. */
export const RING = { index: 2, entries: 4 } as const;

/** Descriptor table. */
export function descSize(entries: number): number {
  return 16 * entries;
}

/** Available ring with `used_event`, which is there whether or not EVENT_IDX is negotiated (2.7.6). */
export function driverSize(entries: number): number {
  return 6 + 2 * entries;
}

/** Used ring with `avail_event` (2.7.8). */
export function deviceSize(entries: number): number {
  return 6 + 8 * entries;
}

/** A ring size that a split queue can have. */
export function isRingSize(entries: number): boolean {
  return Number.isInteger(entries) && entries > 0 && entries <= RING_SIZE_MAX && (entries & (entries - 1)) === 0;
}

/** Number of entries that the driver has made available, mod 2^16. */
export function availIndex(memory: RingMemory, queue: { readonly driver: number }): number {
  return index(memory, queue.driver);
}

/** Heads of the chains from available index `from` up to but without `to`. */
export function availHeads(
  memory: RingMemory,
  queue: { readonly driver: number; readonly size: number },
  from: number,
  to: number,
): number[] {
  return Array.from({ length: (to - from) & 0xffff }, (_, i) => {
    const entry = ((from + i) & 0xffff) % queue.size;
    const [low = 0, high = 0] = memory.read(queue.driver + RING.entries + 2 * entry, 2);
    return low | (high << 8);
  });
}

/** Number of entries that the device has given back, mod 2^16. */
export function usedIndex(memory: RingMemory, queue: { readonly device: number }): number {
  return index(memory, queue.device);
}

function index(memory: RingMemory, ring: number): number {
  return readSteady16(memory, ring + RING.index);
}

/** A hostile guest can keep an index from standing still for as long as it likes. */
const MOST_LOOKS = 16;

/**
 * A number that the other side changes meanwhile. The kernel may copy it byte by byte (seen in a VM that is emulated), and
 * between two bytes 0x00ff becomes 0x0100: only what is read twice was ever there.
 */
export function readSteady16(memory: RingMemory, gpa: number): number {
  let seen = read16(memory, gpa);
  for (let looks = 1; looks < MOST_LOOKS; looks++) {
    const again = read16(memory, gpa);
    if (again === seen) break;
    seen = again;
  }
  return seen;
}

function read16(memory: RingMemory, gpa: number): number {
  const [low = 0, high = 0] = memory.read(gpa, 2);
  return low | (high << 8);
}
