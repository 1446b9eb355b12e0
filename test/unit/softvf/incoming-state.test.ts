import { expect, test } from "bun:test";
import fc from "fast-check";
import { IncomingState } from "../../../src/softvf/incoming-state.ts";
import { BLOB_SIZE_MAX } from "../../../src/virtio/admin/state-blob.ts";

/** A blob with fields of these sizes, padded. */
function blobOf(sizes: readonly number[]): Uint8Array {
  const end = sizes.reduce((sum, size) => sum + 8 + size, 4);
  const blob = new Uint8Array(Math.ceil(end / 4096) * 4096);
  const view = new DataView(blob.buffer);
  view.setUint32(0, sizes.length, true);
  let at = 4;
  for (const size of sizes) {
    view.setUint32(at + 4, size, true);
    blob.fill(at & 0xff, at + 8, at + 8 + size);
    at += 8 + size;
  }
  return blob;
}

test("however a blob is cut, it is whole with its last page and not before", () => {
  const sizes = fc.array(fc.nat(5000), { maxLength: 12 });
  const cuts = fc.array(fc.integer({ min: 1, max: 6000 }), { minLength: 1, maxLength: 5 });
  fc.assert(
    fc.property(sizes, cuts, (fields, lengths) => {
      const blob = blobOf(fields);
      const state = new IncomingState();
      let seen: Uint8Array | undefined;
      for (let at = 0, piece = 0; at < blob.length; piece++) {
        const length = Math.min(lengths[piece % lengths.length]!, blob.length - at);
        seen = state.add(at, blob.subarray(at, at + length));
        at += length;
        expect(seen === undefined).toBe(at < blob.length);
      }
      expect(seen).toEqual(blob);
    }),
  );
});

test("nothing is taken that lies elsewhere, or grows beyond any state", () => {
  const gap = new IncomingState();
  gap.add(0, new Uint8Array(10).fill(1, 0, 1));
  expect(() => gap.add(9, new Uint8Array(1))).toThrow("the piece is at 9; 10 bytes have come");
  expect(() => gap.add(0, new Uint8Array(1))).toThrow("10 bytes have come");
  expect(() => new IncomingState().add(0, Uint8Array.of(1, 0, 1, 0))).toThrow("65537 fields; at most");
  const long = new Uint8Array(16);
  new DataView(long.buffer).setUint32(0, 1, true);
  new DataView(long.buffer).setUint32(8, BLOB_SIZE_MAX, true);
  expect(() => new IncomingState().add(0, long)).toThrow("a field ends at");
  const endless = new IncomingState();
  const piece = new Uint8Array(BLOB_SIZE_MAX - 1);
  new DataView(piece.buffer).setUint32(0, 2, true);
  new DataView(piece.buffer).setUint32(8, BLOB_SIZE_MAX - 100, true);
  expect(endless.add(0, piece)).toBeUndefined();
  expect(() => endless.add(piece.length, new Uint8Array(2))).toThrow("at most");
});
