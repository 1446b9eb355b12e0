import { afterEach, describe, expect, test } from "bun:test";
import { Deadline } from "../../../src/base/deadline.ts";
import { liveFds } from "../../../src/native/fd.ts";
import type { DeviceClass } from "../../../src/plugin.ts";
import { ControlQueue } from "../../../src/virtio/control-queue.ts";
import { type DeviceState, withEnabled } from "../../../src/virtio/device-state.ts";
import { encodeDeviceState } from "../../../src/virtio/device-state-codec.ts";
import { Status } from "../../../src/virtio/features.ts";
import type { MoverHost } from "../../../src/virtio/mover.ts";
import { RegistersMover } from "../../../src/virtio/movers/registers.ts";
import { PciCommand, PciConfig } from "../../../src/virtio/registers.ts";
import { fakeClass } from "../../kit/fake-class.ts";
import { FakeControl } from "../../kit/fake-control.ts";
import { FakeFunction } from "../../kit/fake-function.ts";
import { rejection } from "../../kit/rejection.ts";
import { moverHost } from "./mover-host.ts";
import { FakeRings, wantedState } from "./states.ts";

const soon = (ms = 1000) => Deadline.after(ms, "the test");

async function setUp(queues = 2, members: Partial<MoverHost> = {}) {
  const fn = new FakeFunction({ queues });
  const host = await moverHost(fn, members);
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

describe("receive queues", () => {
  /** Queue 0 receives, queue 1 does not. */
  async function frozen(received = 40) {
    const parts = await setUp(2, { deviceClass: fakeClass({ receives: (queue) => queue === 0 }) });
    await parts.mover.configure(wantedState(2), soon());
    parts.rings.set(0, { available: 128 + received, used: received });
    parts.rings.set(1, { available: 7, used: 7 });
    const state = await parts.mover.freeze(parts.rings, "drained", soon());
    parts.fn.statusWrites.length = 0;
    return { ...parts, state };
  }

  const at = (state: DeviceState, index: number, used: number): DeviceState => ({
    ...state,
    queues: state.queues.map((queue) =>
      queue.index === index ? { ...queue, lastAvail: used, lastUsed: used } : queue,
    ),
  });

  test("are not drained: what waits in them is taken again", async () => {
    const { fn, state } = await frozen();
    expect(state.queues[0]).toMatchObject({ lastAvail: 40, lastUsed: 40 });
    expect(fn.rung).toEqual([1]);
  });

  test("keep a stopped device from memory, until it goes on or is set up anew", async () => {
    const isMaster = (configBytes: Uint8Array) => (configBytes[PciConfig.command]! & PciCommand.busMaster) !== 0;
    const { fn, mover, state } = await frozen();
    expect(isMaster(fn.configBytes)).toBe(false);
    await mover.configure(state, soon());
    expect(isMaster(fn.configBytes)).toBe(true);
    const other = await frozen();
    expect(isMaster(other.fn.configBytes)).toBe(false);
    await other.mover.reset(soon());
    expect(isMaster(other.fn.configBytes)).toBe(false);
    await other.mover.configure(wantedState(2), soon());
    expect(isMaster(other.fn.configBytes)).toBe(true);
  });

  test("go on with a device that took DRIVER_OK back when it was kept from memory, if it still has its queues", async () => {
    const { fn, mover, state } = await frozen();
    // As QEMU's devices do.
    fn.status &= ~Status.driverOk;
    await mover.configure(state, soon());
    expect(fn.statusWrites).toEqual([state.status]);
    expect(fn.status).toBe(state.status);

    for (const forget of [(one: typeof fn) => (one.queues[1]!.enable = 0), (one: typeof fn) => (one.status = 0x3)]) {
      const other = await frozen();
      other.fn.status &= ~Status.driverOk;
      forget(other.fn);
      expect((await rejection(other.mover.configure(other.state, soon()))).message).toMatch(/resume at index/);
      expect(other.fn.statusWrites).toEqual([0]);
    }
  });

  test("keep no later guest from memory, where a stop fails or the process dies that began it", async () => {
    const { fn, host, mover, rings } = await setUp(2, { deviceClass: fakeClass({ receives: (queue) => queue === 0 }) });
    const isMaster = () => (fn.configBytes[PciConfig.command]! & PciCommand.busMaster) !== 0;
    await mover.configure(wantedState(2), soon());
    const snapshot = mover.snapshot();
    const usedOfReceived = wantedState(2).queues[0]!.device + 2;
    const shrunk = {
      read(gpa: number, length: number) {
        if (gpa === usedOfReceived) throw new Error("the memory ends");
        return rings.read(gpa, length);
      },
    };
    for (const next of [mover, new RegistersMover(host, snapshot)]) {
      expect((await rejection(mover.freeze(shrunk, "drained", soon()))).message).toMatch(/memory ends/);
      expect(isMaster()).toBe(false);
      await next.reset(soon());
      await next.configure(wantedState(2), soon());
      expect(isMaster()).toBe(true);
    }
  });

  test("may have moved on while the device was stopped, other queues not", async () => {
    const { fn, mover, state } = await frozen(0xfff0);
    await mover.configure(at(state, 0, 3), soon());
    expect(fn.statusWrites).toEqual([]);
    const other = await frozen();
    expect(await rejection(other.mover.configure(at(other.state, 1, 8), soon()))).toMatchObject({
      code: "notSupported",
    });
  });

  test("of a driver that began anew are not those of before: the device is reset", async () => {
    const { fn, mover, rings } = await setUp(2, { deviceClass: fakeClass({ receives: (queue) => queue === 0 }) });
    await mover.configure(wantedState(2), soon());
    rings.set(0, { available: 128, used: 0 });
    await mover.freeze(rings, "drained", soon());
    fn.statusWrites.length = 0;
    // It may have received meanwhile.
    await mover.configure(wantedState(2), soon());
    expect(fn.statusWrites).toEqual([0, 0x1, 0x3, 0xb, 0xf]);
  });
});

describe("the function's own control queue", () => {
  const CONTROL = 4;
  const undo: Disposable[] = [];
  afterEach(() => {
    for (const one of undo.splice(0).reverse()) one[Symbol.dispose]();
    expect(liveFds()).toBe(0);
  });

  /** The class tells the device how many queues are in use, and how many bytes its configuration begins with. */
  const commands: NonNullable<DeviceClass["control"]>["commands"] = ({ queues, config }) => [
    { name: "USE", request: Uint8Array.of(1, queues.length), answerSize: 1, accepted: ([code]) => code === 0 },
    {
      name: "HINT",
      request: Uint8Array.of(2, Number(config.hint)),
      answerSize: 1,
      accepted: ([code]) => code === 0,
      optional: true,
    },
  ];

  async function setUpControl() {
    const fn = new FakeFunction({ queues: CONTROL + 1, config: new Uint8Array(60).fill(9) });
    const fake = new FakeControl(fn, CONTROL);
    const notes: string[] = [];
    const deviceClass = fakeClass({
      configSpace: { hint: [0, "u8"] },
      control: { queue: () => CONTROL, features: [], commands },
    });
    const plain = await moverHost(fn);
    const { limits, ringDoorbell } = plain;
    const control = await ControlQueue.open({ address: fn.address, ringDoorbell }, CONTROL, limits, fake.domain, "own");
    undo.push(fake, control);
    const host: MoverHost = { ...plain, deviceClass, control: () => control, log: (text) => notes.push(text) };
    const rings = new FakeRings();
    return { fn, fake, notes, rings, host, mover: new RegistersMover(host) };
  }

  test("is told of the queues when the device begins to run, and when they change", async () => {
    const { fn, fake, mover, rings } = await setUpControl();
    fake.answer = (_, honest) => {
      expect(fn.status).toBe(0xf);
      return honest;
    };
    await mover.configure(withEnabled(wantedState(4), new Set([0, 1])), soon());
    expect(fn.queues.map(({ enable }) => enable)).toEqual([1, 1, 1, 1, 1]);
    await mover.enable(new Set([0, 1, 2, 3]), rings, soon());
    await mover.enable(new Set([0, 1, 2, 3]), rings, soon());
    expect(fake.seen.map((request) => [...request])).toEqual([
      [1, 2],
      [2, 0],
      [1, 4],
      [2, 0],
    ]);
    expect(mover.snapshot()).toMatchObject({ kind: "running", state: encodeDeviceState(wantedState(4)) });
    await mover.reset(soon());
    fake.seen.length = 0;
    await mover.configure(wantedState(2), soon());
    expect(fake.seen.map((request) => [...request])).toEqual([
      [1, 2],
      [2, 0],
    ]);
  });

  test("goes on with a device that goes on, and is told of other queues only", async () => {
    const { fn, fake, mover, rings } = await setUpControl();
    await mover.configure(wantedState(2), soon());
    for (const queue of [0, 1]) rings.set(queue, { available: 7, used: 7 });
    const state = await mover.freeze(rings, "drained", soon());
    fn.statusWrites.length = 0;
    fake.seen.length = 0;
    await mover.configure(state, soon());
    expect(fake.seen).toEqual([]);
    await mover.freeze(rings, "drained", soon());
    await mover.configure(withEnabled(state, new Set([0])), soon());
    expect(fake.seen.map(([name]) => name)).toEqual([1, 2]);
    expect(fn.statusWrites).toEqual([]);
  });

  test("that refuses ends the start with a reset device, unless it may", async () => {
    const { fn, fake, mover, notes, rings } = await setUpControl();
    let refused = 2;
    fake.answer = ([name], honest) => ({ ...honest, bytes: Uint8Array.of(name === refused ? 1 : 0) });
    await mover.configure(wantedState(2), soon());
    expect(notes).toEqual([expect.stringMatching(/refused HINT on its control queue/)]);
    refused = 1;
    expect(await rejection(mover.enable(new Set([0]), rings, soon()))).toMatchObject({ code: "notSupported" });
    expect(mover.snapshot()).toMatchObject({ kind: "running", state: { queues: wantedState(2).queues } });
    await mover.reset(soon());
    expect(await rejection(mover.configure(wantedState(2), soon()))).toMatchObject({
      code: "notSupported",
      message: expect.stringMatching(/refused USE on its control queue/),
    });
    expect(fn.status).toBe(0);
    expect(mover.snapshot()).toEqual({ kind: "reset" });
  });

  test("is left alone where the device was set up without it", async () => {
    const { fn, fake, mover, rings, host } = await setUpControl();
    await mover.configure(wantedState(2), soon());
    fake.seen.length = 0;
    fn.queues[CONTROL]!.enable = 0;
    const other = new RegistersMover(host, mover.snapshot());
    await other.enable(new Set([0]), rings, soon());
    expect(fake.seen).toEqual([]);
  });
});

describe("queues that are not used any more", () => {
  test("give back what they had before, and are not waited for afterwards", async () => {
    const { fn, mover, rings } = await setUp();
    await mover.configure(wantedState(2), soon());
    rings.set(1, { available: 9, used: 5 });
    expect(await rejection(mover.enable(new Set([0]), rings, soon(20)))).toMatchObject({
      code: "timedOut",
      message: expect.stringMatching(/queue 1 has 4 buffers in use/),
    });
    fn.onRing = (queue) => {
      // The guest goes on, and the device does as long as it is not told.
      if (queue === 1) rings.set(1, { available: 20, used: 11 });
    };
    await mover.enable(new Set([0]), rings, soon());
    const state = await mover.freeze(rings, "drained", soon());
    expect(state.queues[1]).toMatchObject({ disabled: true, lastAvail: 11, lastUsed: 11 });
  });

  test("are enabled only where the device was set up with them, and a device that was not does not go on", async () => {
    const { fn, host, mover, rings } = await setUp();
    await mover.configure(withEnabled(wantedState(2), new Set([0])), soon());
    // As its PF would have left it.
    fn.queues[1]!.enable = 0;
    expect(await rejection(mover.enable(new Set([0, 1]), rings, soon()))).toMatchObject({
      code: "notSupported",
      message: expect.stringMatching(/queue 1 cannot be enabled: .*set up without it/),
      fix: expect.stringMatching(/reboot/),
    });
    expect(mover.snapshot()).toMatchObject({ kind: "running", state: { queues: [{}, { disabled: true }] } });
    rings.set(0, { available: 7, used: 7 });
    const state = await mover.freeze(rings, "drained", soon());
    const snapshot = mover.snapshot();
    await new RegistersMover(host, snapshot).configure(state, soon());
    const begun = new RegistersMover(host, snapshot).configure(withEnabled(state, new Set([0, 1])), soon());
    expect((await rejection(begun)).message).toMatch(/resume at index 7/);
  });

  test("are enabled on a device that runs only", async () => {
    const { mover, rings } = await setUp();
    expect(await rejection(mover.enable(new Set([0]), rings, soon()))).toMatchObject({ code: "invalid" });
  });
});
