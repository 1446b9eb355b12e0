import { afterEach, describe, expect, spyOn, test } from "bun:test";
import { Deadline } from "../../../src/base/deadline.ts";
import type { Json } from "../../../src/base/json.ts";
import { liveFds, OwnedFd } from "../../../src/native/fd.ts";
import { addon } from "../../../src/native/load.ts";
import { drainEventfd, eventfd } from "../../../src/native/sys.ts";
import type { DeviceClass } from "../../../src/plugin.ts";
import { DataPath } from "../../../src/virtio/data-path.ts";
import { withEnabled } from "../../../src/virtio/device-state.ts";
import type { DeviceFailure } from "../../../src/virtio/device-watch.ts";
import { FeatureBit, featureBits } from "../../../src/virtio/features.ts";
import { fakeClass } from "../../kit/fake-class.ts";
import { FakeControl } from "../../kit/fake-control.ts";
import { FakeFunction, type FakeFunctionOptions } from "../../kit/fake-function.ts";
import { rejection } from "../../kit/rejection.ts";
import { FakeRings, wantedState } from "./states.ts";

const soon = (ms = 1000) => Deadline.after(ms, "the test");
const undo: Disposable[] = [];

afterEach(() => {
  for (const one of undo.splice(0).reverse()) one[Symbol.dispose]();
  expect(liveFds()).toBe(0);
});

async function open(options: FakeFunctionOptions = {}, members: Partial<DeviceClass> = {}) {
  const fn = new FakeFunction(options);
  const path = await DataPath.open(fn, (virtioId) => fakeClass({ virtioId, ...members }), soon());
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
    expect(path.deviceClass.virtioId).toBe(2);
    expect(path.queues).toBe(2);
    expect(path.vectors).toBe(3);
    expect([0, 1, 2].map((queue) => path.queueSizeMax(queue))).toEqual([64, 64, 0]);
    expect(path.running).toBe(false);
    expect(fn.statusWrites).toEqual([0]);
  });

  test("leaves no fd where its interrupt cannot be waited for", async () => {
    using _refused = spyOn(addon, "pollerAdd").mockReturnValue(-24);
    const opening = DataPath.open(new FakeFunction(), (virtioId) => fakeClass({ virtioId }), soon());
    expect((await rejection(opening)).message).toMatch(/EMFILE/);
    expect(liveFds()).toBe(0);
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

describe("queues that are disabled", () => {
  test("are set up and left alone", async () => {
    const { fn, path, eventfds, pair } = await open();
    await path.start(withEnabled(wantedState(2), new Set([0])), eventfds, soon());
    expect([...fn.connected]).toEqual([0]);
    expect(fn.rung).toEqual([0]);
    expect(fn.queues.map(({ enable }) => enable)).toEqual([1, 1]);
    expect([...eventfds.values()].map(({ call }) => drainEventfd(call))).toEqual([1, 0]);
    // Another call is another matter.
    const { kick, call } = pair();
    await path.setKick(1, kick);
    await path.setCall(1, call);
    expect([...fn.connected]).toEqual([0]);
    expect(fn.routes.get(2)).toBe(call);
  });

  test("change while it runs: kicks and calls with them", async () => {
    const { fn, path, eventfds } = await open();
    await path.start(wantedState(2), eventfds, soon());
    for (const { call } of eventfds.values()) drainEventfd(call);
    fn.rung.length = 0;
    await path.enable(new Set([1]), eventfds, new FakeRings(), soon());
    expect([...fn.connected]).toEqual([1]);
    // The first one gives back what it has; the other one looks at its ring.
    expect(fn.rung).toEqual([0, 1]);
    expect([...eventfds.values()].map(({ call }) => drainEventfd(call))).toEqual([0, 1]);
    await path.enable(new Set([0, 1]), eventfds, new FakeRings(), soon());
    expect([...fn.connected].sort()).toEqual([0, 1]);
    expect(await rejection(path.enable(new Set([2]), eventfds, new FakeRings(), soon()))).toMatchObject({
      code: "invalid",
    });
    expect(fn.connected.size).toBe(2);
  });

  test("stay so in the next process", async () => {
    const { fn, path, eventfds, pair } = await open();
    await path.start(withEnabled(wantedState(2), new Set([0])), eventfds, soon());
    const { data, fds } = path.snapshot();
    const own = new Map([...fds].map(([name, number]) => [name, dup(number)]));
    path.abandon();
    const revived = DataPath.revive(fn, JSON.parse(JSON.stringify(data)), own, () => fakeClass());
    undo.push({ [Symbol.dispose]: () => revived.abandon() });
    expect([...fn.connected]).toEqual([0]);
    await revived.setKick(1, pair().kick);
    expect([...fn.connected]).toEqual([0]);
  });
});

describe("the function's own control queue", () => {
  const CONTROL = 2;
  const accepted = () => true;
  const members: Partial<DeviceClass> = {
    configSpace: { count: [0, "u8"] },
    control: {
      queue: ({ count }) => Number(count),
      features: [17, 18],
      commands: ({ queues }) => [{ name: "USE", request: Uint8Array.from(queues), answerSize: 1, accepted }],
    },
  };

  async function openControl() {
    const config = new Uint8Array(60).with(0, CONTROL);
    const parts = await open({ queues: CONTROL + 1, features: featureBits(6, 17), config }, members);
    const fake = new FakeControl(parts.fn, CONTROL);
    undo.push(fake);
    await parts.path.openControl(fake.domain, "own", { count: CONTROL });
    return { ...parts, fake };
  }

  test("has memory of its own, and its features whatever the guest negotiated", async () => {
    const { fn, path, eventfds, fake } = await openControl();
    expect(path.controlQueue).toBe(CONTROL);
    expect(fake.domain.owners).toEqual(["own"]);
    await path.start(wantedState(2), eventfds, soon());
    expect(fn.driverFeatures).toBe(featureBits(17, FeatureBit.version1));
    await path.enable(new Set([1]), eventfds, new FakeRings(), soon());
    expect(fake.seen.map((request) => [...request])).toEqual([[0, 1], [1]]);
  });

  test("goes on in the next process", async () => {
    const { fn, path, eventfds, fake } = await openControl();
    await path.start(wantedState(2), eventfds, soon());
    const { data, fds } = path.snapshot();
    const record = JSON.parse(JSON.stringify(data));
    const own = new Map([...fds].map(([name, number]) => [name, dup(number)]));
    path.abandon();
    const lost = new Map([...own].filter(([name]) => name !== "control").map(([name, fd]) => [name, fd.dup()]));
    const revived = DataPath.revive(fn, record, own, () => fakeClass(members));
    undo.push({ [Symbol.dispose]: () => revived.abandon() });
    expect(revived.controlQueue).toBe(CONTROL);
    await revived.enable(new Set([0]), eventfds, new FakeRings(), soon());
    expect(fake.seen.map((request) => [...request])).toEqual([[0, 1], [0]]);
    expect(() => DataPath.revive(fn, record, lost, () => fakeClass(members))).toThrow(/control queue/);
  });

  test("is refused where the function does not have it, and not looked for where the class has none", async () => {
    const { path, fake } = await openControl();
    const missing = path.openControl(fake.domain, "other", { count: 9 });
    expect(await rejection(missing)).toMatchObject({ code: "probeFailed", message: expect.stringMatching(/queue 9/) });
    const plain = await open();
    await plain.path.openControl(fake.domain, "other", {});
    expect(plain.path.controlQueue).toBeUndefined();
    expect(fake.domain.owners).toEqual(["own"]);
  });
});

describe("the configuration interrupt", () => {
  test("tells of a change, and of a device that needs a reset", async () => {
    const { fn, path, eventfds } = await open();
    await path.start(wantedState(2), eventfds, soon());
    let changes = 0;
    const failures: DeviceFailure[] = [];
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
    const failures: DeviceFailure[] = [];
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

    const revived = DataPath.revive(fn, record, own, () => fakeClass());
    undo.push({ [Symbol.dispose]: () => revived.abandon() });
    expect(revived.running).toBe(true);
    expect(revived.features).toBe(path.features);
    expect([...fn.connected]).toEqual([0, 1]);
    let changes = 0;
    fn.routes.set(0, own.get("config-interrupt")!.number);
    fn.interruptConfig();
    await Bun.sleep(5);
    // Nobody listened before.
    revived.onConfigChange(() => changes++);
    await revived.takeUp(eventfds, soon(), { held: false });
    await until(() => changes === 1);
    await revived.setCall(1, null);
    expect(fn.statusWrites).toEqual([]);
  });

  test("a record that does not fit is refused and its fds closed", async () => {
    const { fn, path } = await open();
    const { data, fds } = path.snapshot();
    const copies = () => new Map([...fds].map(([name, number]) => [name, dup(number)]));
    const revive = (record: Json, own: Map<string, OwnedFd>) => DataPath.revive(fn, record, own, () => fakeClass());
    expect(() => revive({ layout: null }, copies())).toThrow(/not understood/);
    expect(() => revive(data, new Map())).toThrow(/interrupt/);
    expect(() => revive(data, copies().set("kick.9", eventfd()))).toThrow(/spare/);
  });
});

function dup(number: number): OwnedFd {
  const borrowed = new OwnedFd(number);
  const copy = borrowed.dup();
  borrowed.release();
  return copy;
}
