import { afterEach, describe, expect, test } from "bun:test";
import { Deadline } from "../../../src/base/deadline.ts";
import { liveFds, OwnedFd } from "../../../src/native/fd.ts";
import { drainEventfd, eventfd } from "../../../src/native/sys.ts";
import { DataPath, type DataPathFailure } from "../../../src/virtio/data-path.ts";
import { FeatureBit, featureBits } from "../../../src/virtio/features.ts";
import { FakeFunction, type FakeFunctionOptions } from "../../kit/fake-function.ts";
import { rejection } from "../../kit/rejection.ts";
import { FakeRings, wantedState } from "./states.ts";

const soon = (ms = 1000) => Deadline.after(ms, "the test");
const undo: Disposable[] = [];

afterEach(() => {
  for (const one of undo.splice(0).reverse()) one[Symbol.dispose]();
  expect(liveFds()).toBe(0);
});

async function open(options: FakeFunctionOptions = {}) {
  const fn = new FakeFunction(options);
  const path = await DataPath.open(fn, soon());
  undo.push({ [Symbol.dispose]: () => path.abandon() });
  const pair = () => {
    const [kick, call] = [eventfd(), eventfd()];
    undo.push(kick, call);
    return { kick: kick.number, call: call.number };
  };
  const eventfds = new Map([0, 1].map((queue) => [queue, pair()]));
  return { fn, path, eventfds, pair };
}

async function until(condition: () => boolean): Promise<void> {
  await soon().poll(() => condition() || undefined, 1);
}

describe("a data path", () => {
  test("says which doorbell cannot be found, also while another one is being rung", async () => {
    const { fn, path, eventfds } = await open({ queues: 2 });
    const doorbell = fn.doorbell.bind(fn);
    fn.doorbell = (bar, offset) => {
      if (fn.rung.length > 0) throw new Error("it lies outside its BAR");
      fn.rung.push(-1);
      return { ...doorbell(bar, offset), ring: () => Bun.sleep(1).then(() => Promise.reject(new Error("no answer"))) };
    };
    const unconnected = new Map([...eventfds.keys()].map((queue) => [queue, { kick: undefined, call: undefined }]));
    expect((await rejection(path.start(wantedState(2), unconnected, soon()))).message).toMatch(/outside its BAR/);
    // The other one's failure comes later and must not be nobody's: that would end the process.
    await Bun.sleep(5);
  });

  test("opens a reset device and knows its limits", async () => {
    const { fn, path } = await open({ queues: 2, queueSize: 64, features: featureBits(FeatureBit.ringReset) });
    expect(path.virtioId).toBe(2);
    expect(path.queues).toBe(2);
    expect(path.vectors).toBe(3);
    expect([0, 1, 2].map((queue) => path.queueSizeMax(queue))).toEqual([64, 64, 0]);
    expect(path.running).toBe(false);
    expect(fn.statusWrites).toEqual([0]);
  });

  test("starts: calls routed, kicks connected, every doorbell and every call rung once", async () => {
    const own = featureBits(6, FeatureBit.accessPlatform, FeatureBit.ringReset);
    const { fn, path, eventfds } = await open({ features: own | featureBits(5, FeatureBit.vhostLogAll) });
    const wanted = { ...wantedState(2), features: featureBits(6, 9, FeatureBit.vhostLogAll, FeatureBit.version1) };
    await path.start(wanted, eventfds, soon());
    expect(fn.driverFeatures).toBe(own | featureBits(FeatureBit.version1));
    expect(fn.status).toBe(0x0f);
    expect([...fn.connected]).toEqual([0, 1]);
    expect(fn.rung).toEqual([0, 1]);
    expect([1, 2].map((vector) => fn.routes.get(vector))).toEqual([...eventfds.values()].map(({ call }) => call));
    for (const { call } of eventfds.values()) expect(drainEventfd(call)).toBe(1);
    expect(path.running).toBe(true);
  });

  test("stops: kicks away, drained, calls away; and goes on", async () => {
    const { fn, path, eventfds } = await open();
    await path.start(wantedState(2), eventfds, soon());
    const rings = new FakeRings();
    rings.set(0, { available: 3, used: 1 });
    fn.onRing = (queue) => {
      expect(fn.connected.size).toBe(0);
      if (queue === 0) rings.set(0, { available: 3, used: 3 });
    };
    const state = await path.stop(rings, "drained", soon());
    expect(state.queues[0]?.lastUsed).toBe(3);
    expect(path.running).toBe(false);
    expect([...fn.routes.keys()]).toEqual([0]);
    fn.statusWrites.length = 0;
    fn.onRing = () => {};
    await path.start(state, eventfds, soon());
    expect(fn.statusWrites).toEqual([]);
    expect(fn.connected.size).toBe(2);
  });

  test("leaves nothing connected when it does not start", async () => {
    const { fn, path, eventfds } = await open();
    fn.faults.vectorLimit = 2;
    expect(await rejection(path.start(wantedState(2), eventfds, soon()))).toMatchObject({ code: "noVectors" });
    expect(fn.connected.size).toBe(0);
    expect([...fn.routes.keys()]).toEqual([0]);
    expect(fn.status).toBe(0);
  });

  test("is not started twice", async () => {
    const { fn, path, eventfds } = await open();
    await path.start(wantedState(2), eventfds, soon());
    expect((await rejection(path.start(wantedState(2), eventfds, soon()))).message).toMatch(/running already/);
    expect(fn.connected.size).toBe(2);
  });

  test("says how many vectors are needed before it touches the device", async () => {
    const { fn, path, eventfds } = await open({ vectors: 2 });
    const refused = path.start(wantedState(2), eventfds, soon());
    expect(await rejection(refused)).toMatchObject({
      code: "noVectors",
      message: expect.stringMatching(/2 queues need 3 MSI-X vectors/),
    });
    expect(fn.statusWrites).toEqual([0]);
  });

  test("changes the eventfds of a running queue", async () => {
    const { fn, path, eventfds, pair } = await open();
    await path.start(wantedState(2), eventfds, soon());
    fn.rung.length = 0;
    const { kick, call } = pair();
    await path.setKick(1, kick);
    await path.setCall(1, call);
    expect(fn.rung).toEqual([1]);
    expect(fn.routes.get(2)).toBe(call);
    expect(drainEventfd(call)).toBe(1);
    await path.setKick(0, null);
    await path.setCall(0, null);
    expect([...fn.connected]).toEqual([1]);
    expect(fn.routes.has(1)).toBe(false);
    expect(await rejection(path.setKick(2, kick))).toMatchObject({ code: "invalid" });
  });
});

describe("the configuration interrupt", () => {
  test("tells of a change, and of a device that needs a reset", async () => {
    const { fn, path, eventfds } = await open();
    await path.start(wantedState(2), eventfds, soon());
    let changes = 0;
    const failures: DataPathFailure[] = [];
    path.onConfigChange(() => changes++);
    path.onFailure((failure) => failures.push(failure));
    fn.interruptConfig();
    await until(() => changes === 1);
    fn.interruptConfig();
    await until(() => changes === 2);
    fn.status |= 0x40;
    fn.interruptConfig();
    await until(() => failures.length === 1);
    expect(failures[0]).toMatchObject({ gone: false, error: { message: expect.stringMatching(/asks for a reset/) } });
    expect(changes).toBe(2);
  });

  test("a lost function is a failure for good", async () => {
    const { fn, path } = await open();
    const failures: DataPathFailure[] = [];
    path.onFailure((failure) => failures.push(failure));
    fn.lose(new Error("unplugged"));
    await until(() => failures.length === 1);
    expect(failures[0]).toMatchObject({ gone: true, error: { message: "unplugged" } });
  });
});

describe("revival", () => {
  test("goes on from record and fds without touching the device", async () => {
    const { fn, path, eventfds } = await open();
    await path.start(wantedState(2), eventfds, soon());
    const { data, fds } = path.snapshot();
    const record = JSON.parse(JSON.stringify(data));
    const own = new Map([...fds].map(([name, number]) => [name, dup(number)]));
    path.abandon();
    expect(fn.connected.size).toBe(0);
    fn.statusWrites.length = 0;

    const revived = DataPath.revive(fn, record, own);
    undo.push({ [Symbol.dispose]: () => revived.abandon() });
    expect(revived.running).toBe(true);
    expect(revived.features).toBe(path.features);
    expect([...fn.connected]).toEqual([0, 1]);
    let changes = 0;
    revived.onConfigChange(() => changes++);
    fn.routes.set(0, own.get("config-interrupt")!.number);
    fn.interruptConfig();
    await until(() => changes === 1);
    await revived.setCall(1, null);
    expect(fn.statusWrites).toEqual([]);
  });

  test("a record that does not fit is refused and its fds closed", async () => {
    const { fn, path } = await open();
    const { data, fds } = path.snapshot();
    const copies = () => new Map([...fds].map(([name, number]) => [name, dup(number)]));
    expect(() => DataPath.revive(fn, { layout: null }, copies())).toThrow(/not understood/);
    expect(() => DataPath.revive(fn, data, new Map())).toThrow(/interrupt/);
    expect(() => DataPath.revive(fn, data, copies().set("kick.9", eventfd()))).toThrow(/spare/);
  });
});

function dup(number: number): OwnedFd {
  const borrowed = new OwnedFd(number);
  const copy = borrowed.dup();
  borrowed.release();
  return copy;
}
