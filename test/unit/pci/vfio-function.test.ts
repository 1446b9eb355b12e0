import { expect, test } from "bun:test";
import { SystemError, VhostdError } from "../../../src/base/errors.ts";
import { liveFds } from "../../../src/native/fd.ts";
import { Mapping } from "../../../src/native/mmio.ts";
import { drainEventfd, eventfd, signalEventfd, truncate } from "../../../src/native/sys.ts";
import { DeviceRequest } from "../../../src/pci/vfio/device-uapi.ts";
import { VfioFunction } from "../../../src/pci/vfio/function.ts";
import { IrqIndex } from "../../../src/vfio-user/messages.ts";
import { rejection } from "../../kit/rejection.ts";
import { eventually } from "../native/open-fds.ts";
import { ENTRY, FakeVfioDevice, PLACES } from "./fake-vfio-device.ts";
import { closeAfterEach, mappings, open, soon, use } from "./vfio-harness.ts";

const EAGAIN = 11;
const EIO = 5;

closeAfterEach();

test("registers of a mapped BAR are accessed in their width", async () => {
  const { device, fn } = await open();
  const bar = fn.region(PLACES.whole.index);
  expect(bar.size).toBe(PLACES.whole.size);
  expect(await mappings()).toBe(1);
  await bar.write(0x10, 4, 0x89abcdef);
  await bar.write(0x16, 2, 0x1234);
  await bar.write(0x19, 1, 0x56);
  expect(device.peek(PLACES.whole.offset + 0x10, 10)).toEqual([0xef, 0xcd, 0xab, 0x89, 0, 0, 0x34, 0x12, 0, 0x56]);
  expect(await bar.read(0x10, 4)).toBe(0x89abcdef);
  expect(await bar.read(0x16, 2)).toBe(0x1234);
  expect(await bar.read(0x19, 1)).toBe(0x56);
  expect([...(await bar.readBytes(0x11, 8))]).toEqual([0xcd, 0xab, 0x89, 0, 0, 0x34, 0x12, 0]);
  expect((await rejection(bar.read(bar.size - 2, 4))).message).toContain("which has 16384");
  expect((await rejection(bar.readBytes(-1, 2))).message).toContain("BAR 4 of 0000:5a:00.1");
  expect((await rejection(bar.read(2, 4))).message).toContain("cannot read");
  expect(() => fn.region(3)).toThrow("has no BAR 3");
  expect(() => fn.region(6)).toThrow("has no BAR 6");
});

test("what cannot be mapped is read and written through the file", async () => {
  const { device, fn } = await open();
  for (const [space, place] of [
    [fn.config, PLACES.config],
    [fn.region(PLACES.ports.index), PLACES.ports],
  ] as const) {
    await space.write(0x14, 4, 0xfedcba98);
    await space.write(0x18, 2, 0x7654);
    expect(device.peek(place.offset + 0x14, 6)).toEqual([0x98, 0xba, 0xdc, 0xfe, 0x54, 0x76]);
    expect(await space.read(0x14, 4)).toBe(0xfedcba98);
    expect(await space.read(0x18, 1)).toBe(0x54);
    expect([...(await space.readBytes(0x15, 3))]).toEqual([0xba, 0xdc, 0xfe]);
  }
  expect(await mappings()).toBe(0);
});

test("of a sparse region the areas are mapped, the rest is reached through the file", async () => {
  const { device, fn } = await open();
  const bar = fn.region(PLACES.sparse.index);
  expect(bar.place.areas).toEqual([{ offset: 0x1000, size: 0x1000 }]);
  expect(await mappings()).toBe(1);
  for (const offset of [0x0ffc, 0x1000, 0x1ffc, 0x2000]) await bar.write(offset, 4, offset);
  expect(device.peek(PLACES.sparse.offset + 0x0ffc, 8)).toEqual([0xfc, 0x0f, 0, 0, 0, 0x10, 0, 0]);
  expect(await bar.read(0x1ffc, 4)).toBe(0x1ffc);
  expect(await bar.readBytes(0x1ffc, 8)).toEqual(Uint8Array.of(0xfc, 0x1f, 0, 0, 0, 0x20, 0, 0));
});

test("a region smaller than a page is mapped, and is no page to share", async () => {
  const { fn } = await open();
  const bar = fn.region(PLACES.small.index);
  await bar.write(60, 4, 7);
  expect(await bar.read(60, 4)).toBe(7);
  expect(await mappings()).toBe(1);
  expect((await rejection(bar.read(64, 4))).message).toContain("which has 64");
  expect(fn.doorbell(PLACES.small.index, 0).share()).toBeUndefined();
});

test("registers that are switched off are an error, not the end of the process", async () => {
  const { device, fn } = await open();
  const bar = fn.region(PLACES.whole.index);
  truncate(device.fileNumber, 4096);
  const error = await rejection(bar.read(0, 4));
  expect(error.message).toBe("cannot read 4 bytes at 0x0 of BAR 4 of 0000:5a:00.1");
  expect(String(error.cause)).toContain("EFAULT");
  expect((await rejection(bar.write(0, 2, 1))).message).toContain("cannot write");
  expect((await rejection(fn.config.read(0, 2))).message).toContain("configuration space");
});

test("all vectors are enabled when it is opened, and routed one by one", async () => {
  const { device, fn } = await open();
  expect(fn.interrupts.count).toBe(4);
  expect([...device.routes].filter(([key]) => key.startsWith("2."))).toEqual(
    [0, 1, 2, 3].map((vector) => [`2.${vector}`, undefined]),
  );
  using first = eventfd();
  using second = eventfd();
  const fire = () => {
    for (const vector of [0, 1, 2, 3]) device.fire(IrqIndex.msix, vector);
  };
  const routed = fn.interrupts.route(3, first.number);
  await Promise.all([routed, fn.interrupts.route(1, second.number)]);
  fire();
  expect([drainEventfd(first.number), drainEventfd(second.number)]).toEqual([1, 1]);
  await fn.interrupts.route(3, second.number);
  fire();
  expect([drainEventfd(first.number), drainEventfd(second.number)]).toEqual([0, 2]);
  await fn.interrupts.route(1, null);
  fire();
  expect([drainEventfd(first.number), drainEventfd(second.number)]).toEqual([0, 1]);
  expect((await rejection(fn.interrupts.route(4, null))).message).toContain("has no vector 4; it has 4");
});

test("a vector's eventfd may be closed as soon as the route was asked for", async () => {
  const { device, fn } = await open();
  using kept = eventfd();
  let routed: Promise<void>;
  {
    using lent = kept.dup();
    routed = fn.interrupts.route(0, lent.number);
  }
  await routed;
  device.fire(IrqIndex.msix, 0);
  expect(drainEventfd(kept.number)).toBe(1);
});

test("where the machine has fewer vectors left, the function has as many", async () => {
  const { fn } = await open((device) => {
    device.vectorsLeft = 2;
  });
  expect(fn.interrupts.count).toBe(2);
  await fn.interrupts.route(1, null);
});

test("a route that the kernel refuses names vector and function", async () => {
  const { device, fn } = await open();
  device.before = () => {
    throw new SystemError("ioctl", EIO);
  };
  const error = await rejection(fn.interrupts.route(2, null));
  expect(error).toMatchObject({ code: "interruptRegistration" });
  expect(error.message).toBe("vector 2 of 0000:5a:00.1 could not be routed");
});

test("while it is reset accesses wait, in their order", async () => {
  const { device, fn } = await open();
  const bar = fn.region(PLACES.whole.index);
  const gate = Promise.withResolvers<void>();
  device.before = () => gate.promise;
  const resetting = fn.reset(soon());
  await Bun.sleep(1);
  const seen: string[] = [];
  const accesses = [
    bar.write(0, 4, 1).then(() => seen.push("write")),
    bar.read(0, 4).then((value) => seen.push(`read ${value}`)),
    fn.config.read(8, 4).then(() => seen.push("config")),
    fn
      .doorbell(PLACES.whole.index, 0)
      .ring(2)
      .then(() => seen.push("ring")),
  ];
  await Bun.sleep(5);
  expect(seen).toEqual([]);
  expect(device.peek(PLACES.whole.offset, 1)).toEqual([0]);
  gate.resolve();
  await resetting;
  await Promise.all(accesses);
  expect(seen).toEqual(["write", "read 1", "config", "ring"]);
  expect(device.peek(PLACES.whole.offset, 1)).toEqual([2]);
  expect(device.resets).toBe(1);
});

test("a reset that passes its deadline says so, and accesses wait on until it has ended", async () => {
  const { device, fn } = await open();
  const gate = Promise.withResolvers<void>();
  device.before = () => gate.promise;
  expect(await rejection(fn.reset(soon(5)))).toMatchObject({ code: "resetTimedOut" });
  let seen: number | undefined;
  const reading = fn.config.read(8, 4).then((value) => {
    seen = value;
  });
  await Bun.sleep(5);
  expect(seen).toBeUndefined();
  gate.resolve();
  await reading;
  expect(seen).toBe(0x01000001);
});

test("a reset is tried again while somebody has the device locked, and is refused where there is none", async () => {
  const { device, fn } = await open();
  let tries = 0;
  device.before = () => {
    if (++tries < 3) throw new SystemError("ioctl", EAGAIN);
  };
  await fn.reset(soon());
  expect([tries, device.resets]).toEqual([3, 1]);
  device.before = () => {
    throw new SystemError("ioctl", EAGAIN);
  };
  expect(await rejection(fn.reset(soon(30)))).toMatchObject({ code: "resetTimedOut" });
  const other = await open((one) => {
    one.canReset = false;
  });
  expect((await rejection(other.fn.reset(soon()))).message).toContain("no way to reset 0000:5a:00.1 alone");
});

test("a doorbell is rung by us and by the relay, and its page can be mapped by another", async () => {
  const { device, fn } = await open();
  const at = 0x3004;
  const doorbell = fn.doorbell(PLACES.whole.index, at);
  const value = () => device.peek(PLACES.whole.offset + at, 2);
  await doorbell.ring(0x0102);
  expect(value()).toEqual([2, 1]);
  using kick = eventfd();
  signalEventfd(kick.number);
  const connection = doorbell.connect(kick.number, 0x0304);
  expect(await eventually(() => value()[0] === 4)).toBe(true);
  connection[Symbol.dispose]();
  await doorbell.ring(0);
  signalEventfd(kick.number);
  await Bun.sleep(5);
  expect(value()).toEqual([0, 0]);
  const page = doorbell.share()!;
  expect(page).toEqual({ fd: fn.deviceFd, offset: PLACES.whole.offset + 0x3000, size: 4096 });
  using theirs = Mapping.map(page.fd, page.offset, page.size, "read-write");
  theirs.write16(4, 0x0506);
  expect(value()).toEqual([6, 5]);
  expect(() => fn.doorbell(PLACES.whole.index, PLACES.whole.size - 1)).toThrow("lies outside its region");
  const ports = fn.doorbell(PLACES.ports.index, 4);
  expect(ports.share()).toBeUndefined();
  expect(() => ports.connect(kick.number, 0)).toThrow("cannot be mapped");
  await ports.ring(9);
  expect(device.peek(PLACES.ports.offset + 4, 2)).toEqual([9, 0]);
});

test("a reset cuts the kicks: the relay must not wait for it", async () => {
  const { device, fn } = await open();
  const doorbell = fn.doorbell(PLACES.whole.index, 0);
  using kick = eventfd();
  using connection = doorbell.connect(kick.number, 5);
  const gate = Promise.withResolvers<void>();
  device.before = () => gate.promise;
  const resetting = fn.reset(soon());
  await Bun.sleep(1);
  expect(() => doorbell.connect(kick.number, 5)).toThrow("while its function is reset");
  signalEventfd(kick.number);
  await Bun.sleep(5);
  expect(device.peek(PLACES.whole.offset, 1)).toEqual([0]);
  gate.resolve();
  await resetting;
  connection[Symbol.dispose]();
  // A kick from before counts.
  using _again = doorbell.connect(kick.number, 5);
  expect(await eventually(() => device.peek(PLACES.whole.offset, 1)[0] === 5)).toBe(true);
});

test.each([
  ["an error of the device", IrqIndex.error, "AER", "io"],
  ["the kernel wants it back", IrqIndex.request, "unplugged", "noDevice"],
] as const)("it is lost: %s", async (_name, index, message, code) => {
  const { device, fn } = await open();
  device.fire(index, 0);
  const reason = await soon().race(fn.lost);
  expect(reason.message).toContain(message);
  expect(reason).toMatchObject({ code });
});

test("it is lost: it does not answer", async () => {
  const { device, fn } = await open();
  device.fallSilent();
  const reason = await soon(5000).race(fn.lost);
  expect(reason.message).toBe("0000:5a:00.1 does not answer any more: it reads all ones");
});

test("a function that is not PCI Express has no error interrupt", async () => {
  const { device, fn } = await open((one) => {
    one.isExpress = false;
  });
  expect([...fn.snapshot().fds.keys()]).toEqual(["device", "request"]);
  device.fire(IrqIndex.request, 0);
  await soon().race(fn.lost);
});

test("the record is what does not change, and the fds", async () => {
  const { fn } = await open();
  const { data, fds } = fn.snapshot();
  expect(data).toMatchObject({ canReset: true, vectors: 4, config: { size: 4096, areas: [] } });
  expect(JSON.parse(JSON.stringify(data))).toEqual(data);
  expect([...fds.keys()]).toEqual(["device", "error", "request"]);
  expect(fds.get("device")).toBe(fn.deviceFd);
});

test("closing lets go of everything, and leaves once the device is closed", async () => {
  const { device, fn, left } = await open();
  using kick = eventfd();
  const doorbell = fn.doorbell(PLACES.whole.index, 0);
  using _connection = doorbell.connect(kick.number, 1);
  const gate = Promise.withResolvers<void>();
  device.before = () => gate.promise;
  const resetting = fn.reset(soon());
  await Bun.sleep(1);
  const waiting = rejection(fn.config.read(0, 4));
  const closing = fn[Symbol.asyncDispose]();
  expect((await waiting).message).toBe("0000:5a:00.1 was closed");
  expect(await mappings()).toBe(0);
  expect(left).toEqual([]);
  gate.resolve();
  await Promise.all([resetting, closing, fn[Symbol.asyncDispose]()]);
  expect(left).toEqual(["closed"]);
  expect((await rejection(fn.config.read(0, 4))).message).toBe("0000:5a:00.1 was closed");
});

test("abandoned, it is closed at once and left", async () => {
  const { fn, left } = await open();
  fn.region(PLACES.whole.index);
  fn.abandon();
  expect(left).toEqual(["closed"]);
  expect(await mappings()).toBe(0);
  await fn[Symbol.asyncDispose]();
  expect(left).toEqual(["closed"]);
});

test("whatever fails while it is opened, nothing stays open", async () => {
  let requests = 0;
  const whole = await open((device) => {
    device.before = () => {
      requests++;
    };
  });
  await whole.fn[Symbol.asyncDispose]();
  whole.device[Symbol.dispose]();
  expect(requests).toBeGreaterThan(12);
  for (let failing = 1; failing <= requests; failing++) {
    const device = use(new FakeVfioDevice());
    let request = 0;
    device.before = () => {
      if (++request === failing) throw new SystemError("ioctl", EIO);
    };
    const left: boolean[] = [];
    const opening = VfioFunction.over(ENTRY, device.fd, () => left.push(device.fd.closed), soon(), device.calls);
    expect(await rejection(opening)).toBeInstanceOf(VhostdError);
    expect(left).toEqual([true]);
    device[Symbol.dispose]();
    // Requests beside the failed one may still be under way.
    expect(await eventually(() => liveFds() === 0)).toBe(true);
  }
});

test.each([
  ["the first request", DeviceRequest.getInfo, 1],
  // Vectors and both notices, side by side.
  ["the first routing", DeviceRequest.setIrqs, 1],
  ["the second routing", DeviceRequest.setIrqs, 2],
  ["the last routing", DeviceRequest.setIrqs, 3],
] as const)("a deadline that passes during %s leaves nothing open", async (_name, late, count) => {
  const device = use(new FakeVfioDevice());
  const gate = Promise.withResolvers<void>();
  let seen = 0;
  device.before = async (request) => {
    if (request === late && ++seen === count) await gate.promise;
  };
  const left: boolean[] = [];
  const opening = VfioFunction.over(ENTRY, device.fd, () => left.push(true), soon(200), device.calls);
  expect(await rejection(opening)).toMatchObject({ code: "timedOut" });
  expect(seen).toBeGreaterThanOrEqual(count);
  expect(left).toEqual([true]);
  gate.resolve();
  await Bun.sleep(5);
});
