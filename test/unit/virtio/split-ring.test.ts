import { expect, test } from "bun:test";
import { usedIndex } from "../../../src/virtio/split-ring.ts";

/** Memory whose index reads so, one read after the other; the last one for ever. */
function changing(...values: readonly number[]) {
  const left = [...values];
  return {
    reads: 0,
    read(): Uint8Array {
      this.reads++;
      const value = left.length > 1 ? left.shift()! : left[0]!;
      return Uint8Array.of(value & 0xff, value >> 8);
    },
  };
}

test("an index of which half is old and half is new is not believed", () => {
  // 0x00ff becomes 0x0100 between its two bytes.
  expect(usedIndex(changing(0x01ff, 0x0100), { device: 0 })).toBe(0x0100);
  expect(usedIndex(changing(0x0100), { device: 0 })).toBe(0x0100);
});

test("one that never stands still is not waited for", () => {
  const memory = changing(...Array.from({ length: 1000 }, (_, at) => at));
  usedIndex(memory, { device: 0 });
  expect(memory.reads).toBeLessThan(100);
});
