import type { DeviceState } from "../../../src/virtio/device-state.ts";
import { FeatureBit, featureBits } from "../../../src/virtio/features.ts";
import type { RingMemory } from "../../../src/virtio/split-ring.ts";

/** The available and used index of each ring, and available heads, by their address but for two bytes. */
export class FakeRings implements RingMemory {
  private readonly indices = new Map<number, number>();

  read(gpa: number, length: number): Uint8Array {
    const index = this.indices.get(gpa - 2) ?? 0;
    return Uint8Array.of(index & 0xff, index >> 8).subarray(0, length);
  }

  set(queue: number, { available, used }: { available: number; used: number }): void {
    const { driver, device } = queueState(queue);
    this.indices.set(driver, available & 0xffff);
    this.indices.set(device, used & 0xffff);
  }

  /** Entries of the available ring, from an available index on. */
  setHeads(queue: number, from: number, heads: readonly number[]): void {
    const { driver, size } = queueState(queue);
    for (const [i, head] of heads.entries()) this.indices.set(driver + 2 + 2 * ((from + i) % size), head);
  }
}

function queueState(index: number, base = 0) {
  const desc = 0x1_0000_0000 + index * 0x10000;
  return {
    index,
    size: 128,
    vector: index + 1,
    desc,
    driver: desc + 0x4000,
    device: desc + 0x8000,
    lastAvail: base,
    lastUsed: base,
  };
}

/** What a session asks for: queues 0 to `queues` - 1 at `base`. */
export function wantedState(queues: number, base = 0): DeviceState {
  return {
    features: featureBits(FeatureBit.version1),
    status: 0x0f,
    configVector: 0,
    config: new Uint8Array(60),
    queues: Array.from({ length: queues }, (_, index) => queueState(index, base)),
  };
}
