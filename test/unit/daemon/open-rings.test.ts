import { expect, test } from "bun:test";
import { VhostdError } from "../../../src/base/errors.ts";
import { OpenRings } from "../../../src/daemon/open-rings.ts";
import type { DeviceState, QueueState } from "../../../src/virtio/device-state.ts";
import type { RingMemory } from "../../../src/virtio/split-ring.ts";

const RING = { index: 0, size: 128, vector: 1, desc: 0, driver: 0x1000, device: 0x2000 };
const at = (lastUsed: number, more: Partial<QueueState> = {}): DeviceState => ({
  features: 0n,
  status: 0xf,
  configVector: 0,
  config: new Uint8Array(0),
  queues: [{ ...RING, lastAvail: lastUsed, lastUsed, ...more }],
});

/** Guest memory with these indices in it. */
const memory = (available: number, used: number): RingMemory => ({
  read: (gpa) => new Uint8Array(Uint16Array.of(gpa === RING.driver + 2 ? available : used).buffer),
});
const GONE: RingMemory = {
  read: () => {
    throw new VhostdError("badAddress", "the file is shorter");
  },
};

/** What becomes of rings that began here when the function is reset with this in guest memory. */
function resetAt(begun: DeviceState, guest: RingMemory): OpenRings {
  const rings = new OpenRings({});
  rings.begin(begun);
  rings.reset(guest);
  return OpenRings.revive(structuredClone(rings.snapshot()), {});
}

test("rings go on where all came back, or none", () => {
  for (const guest of [memory(0xffff, 0xffff), memory(3, 3), memory(3, 0xfffe)]) {
    expect(() => resetAt(at(0xfffe), guest).begin(at(3))).not.toThrow();
  }
});

test("rings of which some came back do not go on, until the driver begins with new ones", () => {
  for (const guest of [memory(3, 1), memory(3, 0xffff), GONE]) {
    const rings = resetAt(at(0xfffe), guest);
    expect(() => rings.begin(at(1))).toThrow("queue 0 is to resume at index 1, but the function was reset");
    expect(() => rings.begin(at(1))).toThrow("not known");
    rings.begin(at(0));
    rings.reset(memory(0, 0));
    expect(() => rings.begin(at(1))).not.toThrow();
  }
});

test("a stop settles what it says is settled", () => {
  const stopped = (state: DeviceState) => {
    const rings = new OpenRings({});
    rings.begin(at(0));
    rings.stopped(state);
    // The driver has asked for more since.
    rings.reset(memory(20, 7));
    return rings;
  };
  expect(() => stopped(at(7)).begin(at(7))).not.toThrow();
  const listed = at(7, { lastAvail: 9, inFlight: [4, 2] });
  expect(() => stopped(listed).begin(at(7))).toThrow("available 20 and used 7");
});

test("rings that the driver gave up are nobody's", () => {
  const rings = new OpenRings({});
  rings.begin(at(0));
  rings.givenUp();
  rings.reset(memory(3, 1));
  expect(() => rings.begin(at(1))).not.toThrow();
});

test("a malformed record is refused", () => {
  for (const data of [null, {}, { open: [{ index: -1 }], lost: null }, { open: [], lost: 1 }]) {
    expect(() => OpenRings.revive(data, {})).toThrow("the record of a VF's rings");
  }
});

test("each ring is lost for itself: another that begins anew does not bring it back", () => {
  const second = { ...RING, index: 1, driver: 0x3000, device: 0x4000, lastAvail: 0, lastUsed: 0 };
  const rings = new OpenRings({});
  rings.begin({ ...at(0), queues: [...at(0).queues, second] });
  rings.reset({
    read: (gpa) =>
      new Uint8Array(Uint16Array.of(gpa === second.driver + 2 ? 9 : gpa === second.device + 2 ? 4 : 0).buffer),
  });
  expect(rings.trouble).toContain("queue 1 of the last guest");
  rings.begin(at(0));
  expect(() => rings.begin({ ...at(0), queues: [{ ...second, lastAvail: 4, lastUsed: 4 }] })).toThrow("queue 1");
  rings.begin({ ...at(0), queues: [second] });
});

test("a receive queue is never lost: its buffers come back in order", () => {
  const transmit = { ...RING, index: 1, driver: 0x3000, device: 0x4000, lastAvail: 0, lastUsed: 0 };
  const half: RingMemory = { read: (gpa) => new Uint8Array(Uint16Array.of(gpa % 0x2000 === 0x1002 ? 9 : 4).buffer) };
  const net = { receives: (queue: number) => queue % 2 === 0 };
  const rings = new OpenRings(net);
  rings.begin({ ...at(0), queues: [...at(0).queues, transmit] });
  rings.reset(half);
  expect(rings.trouble).toContain("queue 1 of the last guest");
  const revived = OpenRings.revive(structuredClone(rings.snapshot()), net);
  expect(() => revived.begin(at(4))).not.toThrow();
  revived.stopped(at(4, { lastAvail: 9, inFlight: [1] }));
  revived.reset(half);
  expect(() => revived.begin(at(4))).not.toThrow();
});
