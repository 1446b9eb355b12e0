import { expect, test } from "bun:test";
import fc from "fast-check";
import { VhostdError } from "../../src/base/errors.ts";
import { decodeState, encodeState, type VendorState } from "../../src/virtio/admin/state-blob.ts";
import { FUZZ_TIMEOUT, fuzz } from "../kit/fuzz.ts";

const u16 = fc.nat(0xffff);
const u32 = fc.nat(0xffff_ffff);
const u64 = fc.bigInt({ min: 0n, max: (1n << 64n) - 1n });
const heads = (queue: number) => fc.array(u16, { maxLength: 40 }).map((numbers) => ({ queue, heads: numbers }));

/** A queue with what may be said of it. */
const queue = (index: number) =>
  fc.record({
    state: fc.record({
      ...{ index: fc.constant(index), size: u16, vector: u16, enable: u16, notifyOff: u16 },
      ...{ desc: u64, driver: u64, device: u64, notifyData: u16, reset: u16 },
    }),
    indices: fc.option(fc.record({ index: fc.constant(index), lastAvail: u16, lastUsed: u16 })),
    inFlight: fc.option(heads(index)),
    completed: fc.option(heads(index)),
  });

const UNKNOWN_TYPE = fc.oneof(fc.constantFrom(4, 5, 6, 7), fc.integer({ min: 10, max: 0xffff_ffff }));
const opaque = fc.record({ type: UNKNOWN_TYPE, bytes: fc.uint8Array({ maxLength: 50 }) });

const state: fc.Arbitrary<VendorState> = fc
  .record({
    common: fc.record({
      ...{ deviceFeatureSelect: u32, deviceFeatures: u64, driverFeatureSelect: u32, driverFeatures: u64 },
      ...{ configVector: u16, numQueues: u16, queueSelect: u16, status: fc.nat(255), configGeneration: fc.nat(255) },
    }),
    config: fc.uint8Array({ maxLength: 300 }),
    others: fc.array(opaque, { maxLength: 4 }),
    queues: fc.uniqueArray(u16, { maxLength: 60 }).chain((all) => fc.tuple(...all.map(queue))),
  })
  .map(({ queues, ...rest }) => ({
    ...rest,
    queues: queues.map((one) => one.state),
    indices: queues.flatMap(({ indices }) => indices ?? []),
    inFlight: queues.flatMap(({ inFlight }) => inFlight ?? []),
    completed: queues.flatMap(({ completed }) => completed ?? []),
  }));

/** The blob's state, or undefined where it was refused with a reason. */
function decoded(blob: Uint8Array): VendorState | undefined {
  try {
    return decodeState(blob);
  } catch (error) {
    if (!(error instanceof VhostdError) || error.code !== "invalid") throw error;
    expect(error.message).toMatch(/^the device state is malformed: .+/);
    return undefined;
  }
}

interface FieldPlace {
  readonly at: number;
  readonly end: number;
  readonly type: number;
}

/** Where the fields are that the blob counts. */
function fieldsOf(blob: Uint8Array): FieldPlace[] {
  const view = new DataView(blob.buffer, blob.byteOffset);
  const fields: FieldPlace[] = [];
  for (let at = 4; fields.length < view.getUint32(0, true); at = fields.at(-1)!.end) {
    fields.push({ at, end: at + 8 + view.getUint32(at + 4, true), type: view.getUint32(at, true) });
  }
  return fields;
}

function withCount(blob: Uint8Array, change: number): Uint8Array {
  const copy = blob.slice();
  const view = new DataView(copy.buffer);
  view.setUint32(0, view.getUint32(0, true) + change, true);
  return copy;
}

test(
  "a state comes back as it was",
  async () => {
    const property = fc.asyncProperty(state, async (value) => {
      const blob = encodeState(value);
      expect(blob.length % 4096).toBe(0);
      expect(decodeState(blob)).toEqual(value);
    });
    await fuzz("state blob, round trip", property);
  },
  FUZZ_TIMEOUT,
);

test(
  "a reader passes unknown fields, more padding, and a count that is one too few",
  async () => {
    const property = fc.asyncProperty(state, opaque, fc.nat(), fc.nat(9000), async (value, extra, place, padding) => {
      const blob = encodeState(value);
      const fields = fieldsOf(blob);
      const { at } = fields[place % fields.length]!;
      const header = new Uint8Array(Uint32Array.of(extra.type, extra.bytes.length).buffer);
      const parts = [blob.subarray(0, at), header, extra.bytes, blob.subarray(at), new Uint8Array(padding)];
      const extended = withCount(new Uint8Array(Buffer.concat(parts)), 1);
      const { others, ...rest } = decodeState(extended);
      expect(others).toContainEqual(extra);
      expect({ ...rest, others: [] }).toEqual({ ...value, others: [] });
      // Run state of the last queue.
      if (fields.at(-1)?.type === 3) expect(decodeState(withCount(blob, -1))).toEqual(value);
    });
    await fuzz("state blob, tolerance", property);
  },
  FUZZ_TIMEOUT,
);

test(
  "a blob that ends inside a field is refused, and so is one that counts more fields than it has",
  async () => {
    const property = fc.asyncProperty(
      state,
      fc.nat(),
      fc.integer({ min: 1, max: 0x7fff_ffff }),
      async (value, cut, more) => {
        const blob = encodeState(value);
        const end = fieldsOf(blob).at(-1)!.end;
        expect(decoded(blob.subarray(0, cut % end))).toBeUndefined();
        // Behind the last field there is nothing at all.
        expect(decoded(withCount(blob.subarray(0, end), more))).toBeUndefined();
      },
    );
    await fuzz("state blob, cut", property);
  },
  FUZZ_TIMEOUT,
);

test(
  "a blob with bytes changed is refused with a reason, or is a state that can be written again",
  async () => {
    const change = fc.record({ at: fc.nat(400), byte: fc.nat(255) });
    const property = fc.asyncProperty(
      state,
      fc.array(change, { minLength: 1, maxLength: 4 }),
      async (value, changes) => {
        const blob = encodeState(value);
        for (const { at, byte } of changes) blob[at] = byte;
        const seen = decoded(blob);
        if (seen === undefined) return;
        const indices = seen.indices.filter(({ index }) => seen.queues.some((one) => one.index === index));
        const again = decodeState(encodeState({ ...seen, indices }));
        const inOrder = seen.queues.flatMap(({ index }) => indices.filter((one) => one.index === index));
        expect(again).toEqual({ ...seen, indices: inOrder });
      },
    );
    await fuzz("state blob, changed bytes", property);
  },
  FUZZ_TIMEOUT,
);

test(
  "any bytes are refused with a reason, or are a state",
  async () => {
    const words = fc.array(fc.constantFrom(0, 1, 2, 3, 4, 6, 8, 9, 16, 32, 38, 0x7fff_ffff, 0xffff_ffff), {
      maxLength: 200,
    });
    const bytes = fc.oneof(
      fc.uint8Array({ maxLength: 300 }),
      words.map((all) => new Uint8Array(Uint32Array.from(all).buffer)),
    );
    await fuzz(
      "state blob, any bytes",
      fc.asyncProperty(bytes, async (blob) => void decoded(blob)),
    );
  },
  FUZZ_TIMEOUT,
);
