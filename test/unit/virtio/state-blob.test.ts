import { describe, expect, test } from "bun:test";
import fc from "fast-check";
import { decodeState, encodeState, type VendorState } from "../../../src/virtio/admin/state-blob.ts";

const u16 = fc.integer({ min: 0, max: 0xffff });
const u64 = fc.bigInt({ min: 0n, max: (1n << 64n) - 1n });
const bytes = fc.uint8Array({ maxLength: 300 });
const heads = fc.array(u16, { maxLength: 40 });

const anyState: fc.Arbitrary<VendorState> = fc
  .record({
    common: fc.record({
      deviceFeatureSelect: fc.constant(0),
      deviceFeatures: u64,
      driverFeatureSelect: fc.constant(1),
      driverFeatures: u64,
      configVector: u16,
      numQueues: u16,
      queueSelect: u16,
      status: fc.integer({ min: 0, max: 255 }),
      configGeneration: fc.integer({ min: 0, max: 255 }),
    }),
    config: bytes,
    others: fc.array(fc.record({ type: fc.integer({ min: 10, max: 0xffff_ffff }), bytes }), { maxLength: 4 }),
    queues: fc.uniqueArray(
      fc.record({
        index: fc.integer({ min: 0, max: 1000 }),
        size: u16,
        vector: u16,
        enable: u16,
        notifyOff: u16,
        desc: u64,
        driver: u64,
        device: u64,
        notifyData: u16,
        reset: u16,
        lastAvail: u16,
        lastUsed: u16,
        inFlight: heads,
        completed: heads,
      }),
      { selector: ({ index }) => index, maxLength: 6 },
    ),
  })
  .map(({ queues, ...rest }) => ({
    ...rest,
    queues: queues.map(({ lastAvail: _, lastUsed: __, inFlight: ___, completed: ____, ...queue }) => queue),
    indices: queues.map(({ index, lastAvail, lastUsed }) => ({ index, lastAvail, lastUsed })),
    inFlight: queues.map(({ index, inFlight }) => ({ queue: index, heads: inFlight })),
    completed: queues.map(({ index, completed }) => ({ queue: index, heads: completed })),
  }));

const smallState: VendorState = {
  common: {
    deviceFeatureSelect: 0,
    deviceFeatures: 0x3_0000_0040n,
    driverFeatureSelect: 0,
    driverFeatures: 0x3_0000_0000n,
    configVector: 0,
    numQueues: 1,
    queueSelect: 0,
    status: 0x0f,
    configGeneration: 7,
  },
  config: Uint8Array.of(1, 2, 3),
  queues: [
    {
      index: 0,
      size: 256,
      vector: 1,
      enable: 1,
      notifyOff: 0,
      desc: 0x1000n,
      driver: 0x2000n,
      device: 0x3000n,
      notifyData: 0,
      reset: 0,
    },
  ],
  indices: [{ index: 0, lastAvail: 0x1234, lastUsed: 0x1230 }],
  inFlight: [{ queue: 0, heads: [3, 9] }],
  completed: [],
  others: [],
};

/** Offsets of the fields of `smallState`, after the count. */
const AT = { common: 4, config: 4 + 40, queue: 4 + 40 + 11, indices: 4 + 40 + 11 + 46 } as const;

test("every state comes back as it was", () => {
  fc.assert(fc.property(anyState, (state) => expect(decodeState(encodeState(state))).toEqual(state)));
});

test("the bytes are those of the vendor's software", () => {
  const blob = encodeState(smallState);
  expect(blob.length).toBe(4096);
  expect(blob.subarray(0, 4 + 8 + 32).toHex()).toBe(
    "05000000" + // fields
      "00000000" +
      "20000000" + // common configuration, 32 bytes
      "00000000" +
      "4000000003000000" + // offered
      "00000000" +
      "0000000003000000" + // negotiated
      "0000" +
      "0100" +
      "0000" + // vector, queues, selected queue
      "0f07",
  );
  expect(blob.subarray(AT.config, AT.queue).toHex()).toBe("0100000003000000010203");
  expect(blob.subarray(AT.queue, AT.queue + 20).toHex()).toBe(
    "0200000026000000" + "0000" + "0001" + "0100" + "0100" + "0000" + "0010",
  );
  expect(blob.subarray(AT.indices, AT.indices + 14).toHex()).toBe("0300000006000000" + "0000" + "3412" + "3012");
  expect(blob.subarray(AT.indices + 14, AT.indices + 14 + 16).toHex()).toBe(
    "0800000008000000" + "0000" + "0200" + "0300" + "0900",
  );
});

test("a writer that counts one field too few loses nothing", () => {
  const blob = encodeState({ ...smallState, inFlight: [] });
  blob[0]! -= 1;
  expect(decodeState(blob).indices).toEqual(smallState.indices);
});

describe("refused with the reason", () => {
  const bent: [string, (blob: Uint8Array) => Uint8Array, RegExp][] = [
    ["nothing", () => new Uint8Array(3), /it has 3 bytes/],
    ["a field beyond the end", (blob) => blob.subarray(0, AT.indices + 10), /field 3 of 5 runs past its 111 bytes/],
    ["a size near 2^32", (blob) => with32(blob, AT.config + 4, 0xffff_ffff), /field 1 of 5 runs past/],
    ["more fields than there are", (blob) => with32(blob, 0, 8192), /runs past|more than one/],
    ["more fields than any device needs", (blob) => with32(blob, 0, 8193), /8193 fields, at most 8192/],
    ["no common configuration", (blob) => with32(blob, AT.common, 77), /no common configuration/],
    ["two of them", (blob) => with32(blob, AT.queue, 0), /more than one common/],
    ["a queue cut short", (blob) => with32(blob, AT.config, 2), /queue state has 3 bytes, 38 are needed/],
    ["a longer list than its field", (blob) => with32(blob, AT.indices + 14 + 8, 0x0003_0000), /list of 3 descriptors/],
  ];
  test.each(bent)("%s", (_, bend, message) => {
    expect(() => decodeState(bend(encodeState(smallState)))).toThrow(message);
  });

  test("whatever the bytes, nothing but a refusal", () => {
    fc.assert(
      fc.property(fc.uint8Array({ maxLength: 200 }), anyState, fc.nat(), fc.nat(255), (noise, state, at, value) => {
        const blob = encodeState(state);
        blob[at % blob.length] = value;
        for (const bytes of [noise, blob]) {
          try {
            decodeState(bytes);
          } catch (error) {
            expect(error).toMatchObject({ code: "invalid" });
          }
        }
      }),
    );
  });
});

function with32(blob: Uint8Array, at: number, value: number): Uint8Array {
  new DataView(blob.buffer, blob.byteOffset).setUint32(at, value, true);
  return blob;
}
