import { expect, test } from "bun:test";
import { compare, decodeDeviceState, encodeDeviceState } from "../../../src/virtio/device-state-codec.ts";
import { wantedState } from "./states.ts";

test("a state survives JSON", () => {
  const state = { ...wantedState(3, 0xfffe), features: 0x8000_0001_0000_0040n, config: Uint8Array.of(0, 255, 7) };
  const stored = JSON.parse(JSON.stringify(encodeDeviceState(state)));
  expect(decodeDeviceState(stored)).toEqual(state);
});

test("a stored state is not believed", () => {
  const good = encodeDeviceState(wantedState(1));
  const bad = [
    null,
    { ...good, features: "zz" },
    { ...good, config: "***" },
    { ...good, queues: [{ ...good.queues[0], lastAvail: 0x10000 }] },
    { ...good, queues: [{ ...good.queues[0], desc: -1 }] },
    { ...good, queues: [{ ...good.queues[0], size: 0 }] },
  ];
  for (const stored of bad) expect(() => decodeDeviceState(stored)).toThrow(/not understood/);
});

test("differences are named, with both values", () => {
  const a = wantedState(2);
  expect(compare(a, wantedState(2))).toEqual([]);
  const b = { ...wantedState(1, 4), features: 0x3n, config: Uint8Array.of(1) };
  expect(compare({ ...a, config: Uint8Array.of(2) }, b)).toEqual([
    "features: 0x100000000 | 0x3",
    "config: 02 | 01",
    "queue 0 lastAvail: 0 | 4",
    "queue 0 lastUsed: 0 | 4",
    "queue 1: set up | absent",
  ]);
});
