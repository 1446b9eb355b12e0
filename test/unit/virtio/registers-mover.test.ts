import { describe, expect, test } from "bun:test";
import { Deadline } from "../../../src/base/deadline.ts";
import { RegistersMover } from "../../../src/virtio/movers/registers.ts";
import { VirtioPciDevice } from "../../../src/virtio/pci-device.ts";
import { FakeFunction } from "../../kit/fake-function.ts";
import { rejection } from "../../kit/rejection.ts";
import { FakeRings, wantedState } from "./states.ts";

const soon = (ms = 1000) => Deadline.after(ms, "the test");

async function setUp(queues = 2) {
  const fn = new FakeFunction({ queues });
  const device = await VirtioPciDevice.probe(fn, soon());
  const ring = async (queue: number) => device.doorbell(queue, queue).ring(queue);
  const host = { device, ringDoorbell: ring };
  return { fn, host, mover: new RegistersMover(host), rings: new FakeRings() };
}

describe("configure", () => {
  test("goes through the steps of the specification and programs every queue", async () => {
    const { fn, mover } = await setUp();
    await mover.configure(wantedState(2), soon());
    expect(fn.statusWrites).toEqual([0, 0x1, 0x3, 0xb, 0xf]);
    expect(fn.configVector).toBe(0);
    expect(fn.queues).toEqual(
      wantedState(2).queues.map(({ size, vector, desc, driver, device }) => ({
        size,
        vector,
        enable: 1,
        desc: BigInt(desc),
        driver: BigInt(driver),
        device: BigInt(device),
      })),
    );
    expect(fn.rung).toEqual([]);
  });

  test("refuses to begin anywhere but at index 0, and says what to do", async () => {
    const { fn, mover } = await setUp();
    const refused = mover.configure(wantedState(2, 57), soon());
    expect(await rejection(refused)).toMatchObject({
      code: "notSupported",
      message: expect.stringMatching(/queue 0.*57/),
      fix: expect.stringMatching(/reboot/),
    });
    expect(fn.status).toBe(0);
    expect(mover.snapshot()).toEqual({ kind: "reset" });
  });

  test("resets the device again where it has too few vectors", async () => {
    const { fn, mover } = await setUp();
    fn.faults.vectorLimit = 2;
    const refused = mover.configure(wantedState(2), soon());
    expect(await rejection(refused)).toMatchObject({
      code: "noVectors",
      message: expect.stringMatching(/queue 1/),
      fix: expect.stringMatching(/3 MSI-X vectors/),
    });
    expect(fn.status).toBe(0);
  });

  test("notices a queue that was not enabled", async () => {
    const { fn, mover } = await setUp();
    fn.faults.queueEnableIgnored = true;
    expect((await rejection(mover.configure(wantedState(1), soon()))).message).toMatch(/enabled 0/);
    expect(fn.status).toBe(0);
  });
});

describe("freeze", () => {
  test("rings every doorbell once and waits until every buffer is back", async () => {
    const { fn, mover, rings } = await setUp();
    await mover.configure(wantedState(2), soon());
    rings.set(0, { available: 9, used: 9 });
    rings.set(1, { available: 0x10003, used: 0xffff });
    setTimeout(() => rings.set(1, { available: 3, used: 3 }), 10);
    const state = await mover.freeze(rings, "drained", soon());
    expect(fn.rung).toEqual([0, 1]);
    expect(state.queues.map(({ lastAvail, lastUsed }) => [lastAvail, lastUsed])).toEqual([
      [9, 9],
      [3, 3],
    ]);
    expect(fn.status).toBe(0x0f);
  });

  test("gives up at the deadline and names the queue", async () => {
    const { mover, rings } = await setUp();
    await mover.configure(wantedState(2), soon());
    rings.set(1, { available: 5, used: 2 });
    const refused = mover.freeze(rings, "drained", soon(20));
    expect(await rejection(refused)).toMatchObject({
      code: "timedOut",
      message: expect.stringMatching(/queue 1 has 3 buffers/),
    });
    expect(mover.snapshot().kind).toBe("running");
  });

  test("takes a device that goes on while it is looked at for what it is", async () => {
    const { mover, rings } = await setUp(1);
    await mover.configure(wantedState(1), soon());
    rings.set(0, { available: 5, used: 4 });
    let reads = 0;
    const busy = {
      read(gpa: number, length: number) {
        const bytes = rings.read(gpa, length);
        if (reads++ === 0) rings.set(0, { available: 6, used: 6 });
        return bytes;
      },
    };
    const { queues } = await mover.freeze(busy, "drained", soon());
    expect(queues[0]).toMatchObject({ lastAvail: 6, lastUsed: 6 });
  });

  test("does not wait for a device that needs a reset, nor for a broken ring", async () => {
    const { fn, mover, rings } = await setUp();
    await mover.configure(wantedState(1), soon());
    rings.set(0, { available: 500, used: 1 });
    expect((await rejection(mover.freeze(rings, "drained", soon()))).message).toMatch(/499 entries in use, of 128/);
    fn.status |= 0x40;
    expect((await rejection(mover.freeze(rings, "drained", soon()))).message).toMatch(/needsReset/);
  });
});

describe("continuing", () => {
  async function frozen() {
    const parts = await setUp();
    await parts.mover.configure(wantedState(2), soon());
    for (const queue of [0, 1]) parts.rings.set(queue, { available: 7, used: 7 });
    const state = await parts.mover.freeze(parts.rings, "drained", soon());
    parts.fn.statusWrites.length = 0;
    return { ...parts, state };
  }

  test("goes on without a reset where the rings and their indices are the same", async () => {
    const { fn, mover, state } = await frozen();
    await mover.configure({ ...state, config: Uint8Array.of(1, 2, 3) }, soon());
    expect(fn.statusWrites).toEqual([]);
    expect(mover.snapshot().kind).toBe("running");
  });

  test("resets for other rings, and where the device lost its state", async () => {
    const { fn, mover, state } = await frozen();
    await mover.configure(wantedState(2), soon());
    expect(fn.statusWrites[0]).toBe(0);
    for (const queue of [0, 1]) expect(state.queues[queue]?.lastAvail).toBe(7);

    const other = await frozen();
    other.fn.status = 0;
    expect((await rejection(other.mover.configure(other.state, soon()))).message).toMatch(/resume at index 7/);
  });

  test("a mover made from the snapshot stands where the first one stood", async () => {
    const { fn, host, mover, state } = await frozen();
    const snapshot = JSON.parse(JSON.stringify(mover.snapshot()));
    const revived = new RegistersMover(host, snapshot);
    await revived.configure(state, soon());
    expect(fn.statusWrites).toEqual([]);
    expect(() => new RegistersMover(host, { ...snapshot, state: { features: "-1" } })).toThrow(/not understood/);
  });
});
