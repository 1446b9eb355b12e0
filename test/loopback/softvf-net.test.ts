import { expect, test } from "bun:test";
import { Deadline } from "../../src/base/deadline.ts";
import { parsePciAddress } from "../../src/pci/address.ts";
import { decodeState, encodeState } from "../../src/virtio/admin/state-blob.ts";
import { FeatureBit, featureBits, Status } from "../../src/virtio/features.ts";
import { encodeFrame, type Mac } from "../kit/net/frames.ts";
import { NetworkNamespace } from "../kit/network-namespace.ts";
import { rejection } from "../kit/rejection.ts";
import { RawAdmin } from "./softvf-admin.ts";
import { NetBit, NetDriver, serveNet } from "./softvf-net.ts";
import { run, serveBy, workspace } from "./softvf-process.ts";

/** Addresses of VFs 0 and 1. */
const MACS: readonly Mac[] = [
  [2, 0, 0, 0, 0, 0],
  [2, 0, 0, 0, 0, 1],
];
const ELSEWHERE: Mac = [2, 0xff, 0, 0, 0, 9];
const EVERYBODY: Mac = [255, 255, 255, 255, 255, 255];
const [HERE, THERE] = MACS as readonly [Mac, Mac];

const frame = (to: Mac, sequence: number, size = 60) => encodeFrame({ to, from: ELSEWHERE, stream: 1, sequence, size });

/** Sends a frame to a card that echoes, as somebody with that address. @returns whether it came back as it should */
async function comesBack(card: NetDriver, pair: number, size = 60, from = HERE): Promise<boolean> {
  const back = card.received(pair);
  await card.send(encodeFrame({ to: ELSEWHERE, from, stream: 1, sequence: size, size }), pair);
  const expected = encodeFrame({ to: from, from: ELSEWHERE, stream: 1, sequence: size, size });
  return Buffer.compare(await back, expected) === 0;
}
const soon = (what: string) => Deadline.after(10_000, what);

test("frames come back to their pair, and are counted where they are asked for", async () => {
  await using vfs = await serveNet(1, { backend: "echo", queues: 2 });
  await using card = await NetDriver.start(vfs.vf(0), 2);
  expect(await card.command(4, 0, 2, 0)).toBe(0);
  expect(await card.config()).toMatchObject({ status: 1, maxVirtqueuePairs: 2, mtu: 1500, mac: 0x02n });
  for (const [pair, size] of [
    [0, 60],
    [1, 1514],
    [0, 777],
  ] as const) {
    expect(await comesBack(card, pair, size)).toBe(true);
  }
  const stats = await card.driver.fn.queueStats!();
  expect(stats).toEqual([
    { received: 2, completed: 2, bad: 0, bytes: 837 },
    { received: 2, completed: 2, bad: 0, bytes: 837 },
    { received: 1, completed: 1, bad: 0, bytes: 1514 },
    { received: 1, completed: 1, bad: 0, bytes: 1514 },
    expect.objectContaining({ received: 1, completed: 1, bad: 0 }),
  ]);
  expect(vfs.vf(0).fn.stats()).toEqual(stats);
});

test("MAC, MTU and link are changed under a driver, which is interrupted and sees it", async () => {
  await using vfs = await serveNet(1, { backend: "echo" });
  await using card = await NetDriver.start(vfs.vf(0));
  const { fn } = vfs.vf(0);
  const changes = [
    ["mtu", 9000, { mtu: 9000, status: 1 }],
    ["mac", "02:00:00:00:00:07", { mac: 0x070000000002n, status: 1 }],
    ["link", false, { status: 0 }],
    ["link", true, { status: 1 }],
  ] as const;
  for (const [option, value, seen] of changes) {
    const told = card.driver.configInterrupt();
    await fn.set(option, value);
    await told;
    expect(await card.config()).toMatchObject(seen);
  }
  const calls = card.driver.configCalls;
  await fn.set("link", true);
  expect(() => fn.check("mtu", 67)).toThrow("from 68 to 65535");
  expect(card.driver.configCalls).toBe(calls);
});

test("a card receives what is for it, everything once it is told to, and forgets that with a reset", async () => {
  await using vfs = await serveNet(2, { backend: "wire" });
  await using there = await NetDriver.start(vfs.vf(1));
  for (const round of [1, 2]) {
    await using here = await NetDriver.start(vfs.vf(0));
    await here.linkIs(true);
    // The second one comes in its place, where the first is not for this card.
    const exchange = async (first: Mac, second: Mac) => {
      const got = here.received();
      await there.send(frame(first, round));
      await there.send(frame(second, round));
      const to = [...(await got).subarray(0, 6)];
      if (to.join() === first.join()) await here.received();
      return to;
    };
    expect(await exchange(ELSEWHERE, HERE)).toEqual([...HERE]);
    expect(await exchange(ELSEWHERE, EVERYBODY)).toEqual([...EVERYBODY]);
    expect(await here.command(0, 0, 1)).toBe(0);
    expect(await exchange(ELSEWHERE, HERE)).toEqual([...ELSEWHERE]);
    expect(await here.command(0, 99, 1)).toBe(1);
  }
});

test("a wire's link is up while both ends run, and its pairs go to pairs", async () => {
  await using vfs = await serveNet(2, { backend: "wire", queues: 2 });
  await using here = await NetDriver.start(vfs.vf(0), 2);
  expect(await here.config()).toMatchObject({ status: 0 });
  await here.command(4, 0, 2, 0);
  {
    const told = here.driver.configInterrupt();
    await using there = await NetDriver.start(vfs.vf(1), 2);
    await there.command(4, 0, 2, 0);
    await told;
    await here.linkIs(true);
    await there.linkIs(true);
    for (const pair of [0, 1]) {
      const got = there.received(pair);
      await here.send(frame(THERE, pair), pair);
      expect(await got).toEqual(frame(THERE, pair));
    }
    const unplugged = here.driver.configInterrupt();
    await vfs.vf(1).fn.set("link", false);
    await unplugged;
    await here.linkIs(false);
    await there.linkIs(false);
    await vfs.vf(1).fn.set("link", true);
    await here.linkIs(true);
  }
  await here.linkIs(false);
  // Nobody is there: what is sent is dropped, and the queue goes on.
  for (const sequence of [1, 2, 3]) await here.send(frame(THERE, sequence));
});

test("a wire has two ends", async () => {
  const third = await rejection(serveNet(3, { backend: "wire", wire: "{pf} cable" }));
  expect(third.message).toMatch(/0000:5a:00\.3: .*0000:5a:00\.0 cable/);
  await using again = await serveNet(4, { backend: "wire", wire: "cable{vf}" });
  expect(again.vf(3).pf).toBeDefined();
});

test("without a control queue there is one pair, and everything is received", async () => {
  const features = featureBits(FeatureBit.version1, NetBit.mac, NetBit.mrgRxbuf, NetBit.status);
  await using vfs = await serveNet(1, { backend: "echo", queues: 4, controlQueue: false });
  await using card = await NetDriver.start(vfs.vf(0), 1, features);
  expect(await card.driver.device.features()).toBe(featureBits(3, 5, 15, 16, 22, 28, 29, 32, 33, 63));
  expect(vfs.vf(0).fn.layout).toMatchObject({ queues: 8, vectors: 9 });
  expect(await comesBack(card, 0, 60, THERE)).toBe(true);
});

test("a card that moves is drained with its receive buffers empty, and receives what the state says", async () => {
  await using vfs = await serveNet(1, { backend: "echo" });
  await using card = await NetDriver.start(vfs.vf(0));
  await using admin = await RawAdmin.open(vfs.physical, 2);
  expect(await card.command(0, 0, 1)).toBe(0);
  const waiting = [card.received(), card.received()];
  const send = (from: Mac, sequence: number) =>
    card.send(encodeFrame({ to: ELSEWHERE, from, stream: 1, sequence, size: 60 }));
  const cameFor = async (index: number) => [...(await waiting[index]!).subarray(0, 6)];
  await send(THERE, 1);
  expect(await cameFor(0)).toEqual([...THERE]);

  await admin.steps(0, "quiesced", "freezed");
  const saved = decodeState(await admin.save(0));
  expect(saved.indices.slice(0, 2)).toEqual([
    { index: 0, lastAvail: 1, lastUsed: 1 },
    { index: 1, lastAvail: 1, lastUsed: 1 },
  ]);
  expect(saved.others).toEqual([{ type: 4, bytes: Uint8Array.of(1, 0, 0, 0) }]);
  const malformed = { ...saved, others: [{ type: 4, bytes: new Uint8Array(3) }] };
  expect(await admin.restore(0, encodeState(malformed))).not.toBe(0);
  const choosy = { ...saved, others: [{ type: 4, bytes: new Uint8Array(4) }] };
  expect(await admin.restore(0, encodeState(choosy))).toBe(0);
  await admin.steps(0, "quiesced", "running");

  // What is not for this card is not for it any more.
  await send(THERE, 2);
  await send(HERE, 3);
  expect(await cameFor(1)).toEqual([...HERE]);
});

test("a restored card uses the pairs that are enabled in its state, nobody tells it", async () => {
  await using vfs = await serveNet(1, { backend: "echo", queues: 2 });
  await using card = await NetDriver.start(vfs.vf(0), 2);
  await using admin = await RawAdmin.open(vfs.physical, 2);
  // A queue that is not enabled is not in the saved indices: whoever enables it again knows where it stood.
  const known = new Map([0, 1, 2, 3, 4].map((index) => [index, { index, lastAvail: 0, lastUsed: 0 }]));
  const useQueuesBelow = async (end: number) => {
    await admin.steps(0, "quiesced", "freezed");
    const saved = decodeState(await admin.save(0));
    for (const entry of saved.indices) known.set(entry.index, entry);
    const queues = saved.queues.map((queue) => ({ ...queue, enable: queue.index < end ? 1 : 0 }));
    expect(await admin.restore(0, encodeState({ ...saved, queues, indices: [...known.values()] }))).toBe(0);
    await admin.steps(0, "quiesced", "running");
    return saved.indices.map(({ index }) => index);
  };

  expect(await useQueuesBelow(4)).toEqual([0, 1, 2, 3, 4]);
  expect(await comesBack(card, 1, 61)).toBe(true);
  expect(await useQueuesBelow(2)).toEqual([0, 1, 2, 3]);
  expect(vfs.vf(0).fn.virtio.enabledQueues).toEqual([0, 1]);
  expect(await comesBack(card, 0, 62)).toBe(true);
  expect(await useQueuesBelow(4)).toEqual([0, 1]);
  expect(await comesBack(card, 1, 63)).toBe(true);
  expect(vfs.vf(0).fn.virtio.status & Status.needsReset).toBe(0);
});

test("a TAP carries frames in both directions; one that is taken away under load takes its link down, others go on", async () => {
  await using space = await workspace();
  await using network = await NetworkNamespace.create(space.path("."));
  for (const name of ["vf0", "vf1"]) await network.addTap(name);
  const pf = "0000:5a:00.0";
  const place = ["--runtime-dir", space.path("run")];
  const options = ["--class", "net", "--vfs", "2", "--backend", "tap", "--tap", "vf{vf}"];
  await using program = await serveBy(network.prefix, "--pf", pf, ...options, ...place);
  const reach = (address: string) => ({
    address: parsePciAddress(address),
    server: { path: space.path(`run/devices/${address}/vfio-user.sock`) },
  });
  await using card = await NetDriver.start(reach("0000:5a:00.1"));
  await using other = await NetDriver.start(reach("0000:5a:00.2"));
  await card.linkIs(true);
  // The host's neighbour discovery for its new interface.
  expect((await card.received()).length).toBeGreaterThan(0);
  const before = await network.counter("vf0", "rx_packets");
  await card.send(frame(EVERYBODY, 1));
  expect(await network.counter("vf0", "rx_packets")).toBe(before + 1);

  const load = (async () => {
    for (let sequence = 0; sequence < 2000; sequence++) await card.send(frame(EVERYBODY, sequence));
  })();
  const told = card.driver.configInterrupt();
  await network.removeLink("vf0");
  await told;
  await card.linkIs(false);
  await load;
  await other.linkIs(true);
  const counted = await network.counter("vf1", "rx_packets");
  await other.send(frame(EVERYBODY, 1));
  expect(await network.counter("vf1", "rx_packets")).toBe(counted + 1);

  const { out } = await run("list", ...place);
  expect(out).toMatch(/0000:5a:00\.1 .*link down/);
  expect(out).toMatch(/0000:5a:00\.2 .*link up/);
  expect((await run("stats", ...place)).out).toMatch(
    /0000:5a:00\.2 +queue 1 +1 received +1 completed +0 bad +60 bytes/,
  );
  expect(await soon("the end").race(program.stop())).toBe(0);
}, 20_000);

test("a TAP that cannot be had is named", async () => {
  await using space = await workspace();
  await using network = await NetworkNamespace.create(space.path("."));
  await network.addTap("single");
  const options = ["--pf", "0000:5a:00.0", "--class", "net", "--backend", "tap", "--runtime-dir", space.path("run")];
  const failure = await rejection(serveBy(network.prefix, ...options, "--tap", "lo"));
  expect(failure.message).toMatch(/0000:5a:00\.1: .*lo/);
}, 20_000);
