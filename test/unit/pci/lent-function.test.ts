import { expect, test } from "bun:test";
import { drainEventfd, eventfd, signalEventfd } from "../../../src/native/sys.ts";
import { msixRanges } from "../../../src/pci/vfio/msix.ts";
import { rejection } from "../../kit/rejection.ts";
import { eventually } from "../native/open-fds.ts";
import { type FakeVfioDevice, PLACES } from "./fake-vfio-device.ts";
import { closeAfterEach, mappings, open as openFunction, soon } from "./vfio-harness.ts";

/** A function of which somebody else has the fd, who may have the kernel hold up whoever touches it. */

const BAR = PLACES.whole.index;
/** Of the doorbell in the BAR. */
const AT = 0x3004;

closeAfterEach();

async function open(prepare?: (device: FakeVfioDevice) => void) {
  const opened = await openFunction(prepare);
  const { device, fn } = opened;
  const value = () => device.peek(PLACES.whole.offset + AT, 2);
  return { ...opened, doorbell: fn.doorbell(BAR, AT), value };
}

/** Accesses are held up until `release` is called. */
function holdUp(device: FakeVfioDevice): () => void {
  const gate = Promise.withResolvers<void>();
  device.beforeAccess = () => gate.promise;
  return () => {
    device.beforeAccess = () => {};
    gate.resolve();
  };
}

/** Configuration space with an MSI-X capability at 0x50, behind another. */
function configWith(control: number, table: number, pending: number): Uint8Array {
  const bytes = new Uint8Array(256);
  bytes[0x06] = 0x10;
  bytes[0x34] = 0x40;
  bytes.set([0x09, 0x50], 0x40);
  const words = new DataView(bytes.buffer);
  bytes.set([0x11, 0], 0x50);
  words.setUint16(0x52, control, true);
  words.setUint32(0x54, table, true);
  words.setUint32(0x58, pending, true);
  return bytes;
}

test("it is mapped until a doorbell is given away, and not from then on", async () => {
  const { device, fn, doorbell } = await open();
  const bar = fn.region(BAR);
  await bar.write(0, 4, 7);
  expect(doorbell.page).toEqual({ offset: PLACES.whole.offset + 0x3000, size: 4096 });
  expect(await mappings()).toBe(1);
  const before = device.accessCalls.length;
  expect(await bar.read(0, 4)).toBe(7);
  expect(device.accessCalls.length).toBe(before);
  expect(fn.snapshot().data).toMatchObject({ lent: false });

  expect(doorbell.share()).toEqual({ fd: fn.deviceFd, offset: PLACES.whole.offset + 0x3000, size: 4096 });
  expect(await mappings()).toBe(0);
  expect(await bar.read(0, 4)).toBe(7);
  expect(device.accessCalls.length).toBe(before + 1);
  await fn.region(PLACES.sparse.index).write(0x1000, 4, 9);
  expect(device.peek(PLACES.sparse.offset + 0x1000, 1)).toEqual([9]);
  expect(await mappings()).toBe(0);
  expect(doorbell.share()).toBeDefined();
  expect(fn.snapshot().data).toMatchObject({ lent: true });
});

test("accesses of one turn are one call, in their order and width, and each fails by itself", async () => {
  const { device, fn, doorbell } = await open();
  doorbell.share();
  const bar = fn.region(BAR);
  device.accessCalls.length = 0;
  const seen = await Promise.all([
    bar.write(0x10, 4, 0x89abcdef),
    bar.read(0x10, 4),
    bar.write(0x12, 2, 0x1234),
    bar.read(0x10, 4),
    bar.write(0x11, 1, 0x56),
    bar.readBytes(0x11, 8),
    fn.config.read(0x0a, 2),
    rejection(bar.write(0x10, 1, 256)),
    rejection(bar.read(0x11, 2)),
    // What follows at once is of the same turn.
    Promise.resolve().then(() => bar.read(0x10, 1)),
  ]);
  expect(device.accessCalls).toEqual([5 + 4 + 1 + 1]);
  expect(seen.slice(0, 5)).toEqual([undefined, 0x89abcdef, undefined, 0x1234cdef, undefined]);
  expect([...(seen[5] as Uint8Array)]).toEqual([0x56, 0x34, 0x12, 0, 0, 0, 0, 0]);
  expect(seen[6]).toBe(0x0100);
  expect(seen[7]).toMatchObject({ code: "barRead" });
  expect(seen[8]).toMatchObject({ code: "barRead" });
  expect(seen[9]).toBe(0xef);
});

test("while the kernel holds an access up, the program and its deadlines go on", async () => {
  const { device, fn, doorbell } = await open();
  doorbell.share();
  const release = holdUp(device);
  let seen: number | undefined;
  const reading = fn
    .region(BAR)
    .read(0, 4)
    .then((value) => {
      seen = value;
    });
  expect(await rejection(soon(5).race(fn.region(BAR).read(4, 4)))).toMatchObject({ code: "timedOut" });
  const behind = fn.config.read(8, 4);
  await Bun.sleep(5);
  expect(seen).toBeUndefined();
  release();
  await reading;
  expect(seen).toBe(0);
  expect(await behind).toBe(0x01000001);
});

test("what is not lent is not overtaken by accesses to its mapping", async () => {
  const { device, fn } = await open();
  const bar = fn.region(BAR);
  const release = holdUp(device);
  const order: string[] = [];
  const both = [
    fn.config.write(0x40, 4, 1).then(() => order.push("config")),
    bar.write(0, 4, 2).then(() => order.push("BAR")),
  ];
  await Bun.sleep(5);
  expect(order).toEqual([]);
  expect(device.peek(PLACES.whole.offset, 1)).toEqual([0]);
  release();
  await Promise.all(both);
  expect(order).toEqual(["config", "BAR"]);
  const calls = device.accessCalls.length;
  await bar.write(0, 4, 3);
  expect(device.accessCalls.length).toBe(calls);
});

test("kicks leave the relay when a doorbell is given away: none is lost, and at most one write waits for each", async () => {
  const { device, fn, doorbell, value } = await open();
  using kick = eventfd();
  using _connection = doorbell.connect(kick.number, 0x0304);
  signalEventfd(kick.number);
  expect(await eventually(() => value()[0] === 4)).toBe(true);
  await doorbell.ring(0);
  const release = holdUp(device);
  doorbell.share();
  // What the relay was told of is told once more.
  expect(await eventually(() => device.accessCalls.length > 1)).toBe(true);
  const calls = device.accessCalls.length;
  for (let round = 0; round < 5; round++) {
    signalEventfd(kick.number);
    await Bun.sleep(1);
  }
  expect(device.accessCalls.length).toBe(calls);
  expect(value()).toEqual([0, 0]);
  release();
  expect(await eventually(() => device.accessCalls.length > calls)).toBe(true);
  expect(value()).toEqual([4, 3]);
  // Nobody kicks: nothing is written.
  await Bun.sleep(20);
  expect(device.accessCalls.slice(calls)).toEqual([1]);
  expect(drainEventfd(kick.number)).toBe(0);
  await fn.region(BAR).write(AT - (AT % 4), 4, 0);
  signalEventfd(kick.number);
  expect(await eventually(() => value()[0] === 4)).toBe(true);
});

test("a kick that is connected later goes the same way; one from before counts; cut, it is not heard", async () => {
  const { device, doorbell, value } = await open();
  doorbell.share();
  using kick = eventfd();
  signalEventfd(kick.number);
  const connection = doorbell.connect(kick.number, 5);
  expect(await eventually(() => value()[0] === 5)).toBe(true);
  connection[Symbol.dispose]();
  connection[Symbol.dispose]();
  const calls = device.accessCalls.length;
  signalEventfd(kick.number);
  await Bun.sleep(5);
  expect(device.accessCalls.length).toBe(calls);
  expect(drainEventfd(kick.number)).toBe(1);
});

test("a doorbell that cannot be reached for a while is rung by the next kick", async () => {
  const { device, doorbell, value } = await open();
  doorbell.share();
  using kick = eventfd();
  using _connection = doorbell.connect(kick.number, 5);
  let refused = 0;
  device.beforeAccess = () => {
    refused++;
    throw new Error("refused");
  };
  signalEventfd(kick.number);
  expect(await eventually(() => refused === 1)).toBe(true);
  await Bun.sleep(5);
  expect(refused).toBe(1);
  device.beforeAccess = () => {};
  signalEventfd(kick.number);
  expect(await eventually(() => value()[0] === 5)).toBe(true);
});

test("a reset cuts the kicks of a function that was lent, too", async () => {
  const { device, fn, doorbell, value } = await open();
  doorbell.share();
  using kick = eventfd();
  using _connection = doorbell.connect(kick.number, 5);
  const gate = Promise.withResolvers<void>();
  device.before = () => gate.promise;
  const resetting = fn.reset(soon());
  await Bun.sleep(1);
  expect(() => doorbell.connect(kick.number, 5)).toThrow("while its function is reset");
  signalEventfd(kick.number);
  gate.resolve();
  await resetting;
  await Bun.sleep(5);
  expect(value()).toEqual([0, 0]);
});

test("closing ends an access that is held up, and leaves once it has ended", async () => {
  const { device, fn, doorbell, left } = await open();
  doorbell.share();
  using kick = eventfd();
  using _connection = doorbell.connect(kick.number, 5);
  const release = holdUp(device);
  const calls = device.accessCalls.length;
  const reading = rejection(fn.region(BAR).read(0, 4));
  expect(await eventually(() => device.accessCalls.length > calls)).toBe(true);
  const waiting = rejection(fn.config.read(0, 4));
  const closing = fn[Symbol.asyncDispose]();
  expect((await reading).message).toBe("0000:5a:00.1 was closed");
  expect((await waiting).message).toBe("0000:5a:00.1 was closed");
  await Bun.sleep(5);
  expect(left).toEqual([]);
  release();
  await closing;
  expect(left).toEqual(["closed"]);
  expect(device.accessCalls.length).toBe(calls + 1);
});

test("closing does not wait for ever for an access that the kernel does not end", async () => {
  const { device, fn, doorbell, left } = await open();
  doorbell.share();
  const release = holdUp(device);
  const calls = device.accessCalls.length;
  const reading = rejection(fn.region(BAR).read(0, 4));
  expect(await eventually(() => device.accessCalls.length > calls)).toBe(true);
  await soon(10_000).race(fn[Symbol.asyncDispose]());
  expect(left).toEqual(["closed"]);
  expect(await reading).toMatchObject({ code: "cancelled" });
  release();
  await Bun.sleep(5);
}, 20_000);

test("looks whether it answers wait for the kernel without keeping anybody", async () => {
  const { device, fn } = await open();
  const gate = Promise.withResolvers<void>();
  let held = 0;
  device.beforeAccess = () => {
    held++;
    return gate.promise;
  };
  expect(await eventually(() => held > 0)).toBe(true);
  // Never lent: its registers wait behind.
  let seen = false;
  const reading = fn
    .region(BAR)
    .read(0, 4)
    .then(() => {
      seen = true;
    });
  await Bun.sleep(5);
  expect(seen).toBe(false);
  gate.resolve();
  await reading;
});

test("a page with interrupts of the function in it is not given away", async () => {
  const at = PLACES.config.offset;
  // The table in the second page of BAR 4, pending bits at the end of the third.
  const config = configWith(3, 0x1000 | BAR, 0x2ff8 | BAR);
  const { doorbell, fn } = await open((device) => {
    device.poke(at, [...config]);
    device.poke(at + 8, [1, 0, 0, 1]);
  });
  expect(fn.snapshot().data).toMatchObject({
    msix: [
      { bar: BAR, offset: 0x1000, size: 64 },
      { bar: BAR, offset: 0x2ff8, size: 8 },
    ],
  });
  const pages = [0, 0x1000, 0x2000].map((offset) => fn.doorbell(BAR, offset));
  expect(pages.map(({ page }) => page?.size)).toEqual([4096, undefined, undefined]);
  expect(pages[1]!.share()).toBeUndefined();
  expect(await mappings()).toBe(1);
  expect(doorbell.share()).toBeDefined();
});

test("where a function has its interrupts, as its configuration space says it", () => {
  expect(msixRanges(new Uint8Array(256))).toEqual([]);
  expect(msixRanges(new Uint8Array(256).fill(0xff))).toEqual([]);
  expect(msixRanges(configWith(0xc000 | 0x7ff, 0x8000_0000, 0x13))).toEqual([
    { bar: 0, offset: 0x8000_0000, size: 32_768 },
    { bar: 3, offset: 0x10, size: 256 },
  ]);
  const round = configWith(0, 0, 0);
  round.set([0x05, 0x40], 0x50);
  expect(msixRanges(round)).toEqual([]);
  const late = configWith(0, 0, 0);
  late.set([0x09, 0xf8], 0x40);
  late[0xf8] = 0x11;
  expect(msixRanges(late)).toEqual([]);
});
