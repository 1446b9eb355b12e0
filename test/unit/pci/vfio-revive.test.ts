import { expect, test } from "bun:test";
import type { Json } from "../../../src/base/json.ts";
import { duplicate, liveFds, type OwnedFd } from "../../../src/native/fd.ts";
import { drainEventfd, eventfd, signalEventfd } from "../../../src/native/sys.ts";
import { DeviceRequest } from "../../../src/pci/vfio/device-uapi.ts";
import { VfioFunction } from "../../../src/pci/vfio/function.ts";
import { IrqIndex } from "../../../src/vfio-user/messages.ts";
import { eventually } from "../native/open-fds.ts";
import { ENTRY, type FakeVfioDevice, PLACES } from "./fake-vfio-device.ts";
import { closeAfterEach, mappings, open, soon, use } from "./vfio-harness.ts";

/** Functions of which the process dies, and another one goes on with them from what `snapshot` gave. */

closeAfterEach();

interface Stored {
  readonly data: Json;
  readonly fds: Map<string, OwnedFd>;
}

/** What a keeper has. */
function stored(fn: VfioFunction): Stored {
  const { data, fds } = fn.snapshot();
  const own = new Map([...fds].map(([name, fd]) => [name, use(duplicate(fd))]));
  return { data: JSON.parse(JSON.stringify(data)) as Json, fds: own };
}

/** Another process, which gets fds of its own. */
function revive(device: FakeVfioDevice, { data, fds }: Stored, left: () => void = () => {}): VfioFunction {
  const own = new Map([...fds].map(([name, fd]) => [name, fd.dup()]));
  return VfioFunction.revive(ENTRY, left, data, own, device.calls);
}

test("it is gone on with without a word to the device: registers, vectors, doorbells and the way it is closed", async () => {
  const { device, fn } = await open();
  using call = eventfd();
  await fn.interrupts.route(2, call.number);
  await fn.region(PLACES.whole.index).write(0x20, 4, 0x1234_5678);
  const kept = stored(fn);
  fn.abandon();
  const requests: number[] = [];
  device.before = (request) => void requests.push(request);
  device.accessCalls.length = 0;
  const left: string[] = [];
  const revived = use(revive(device, kept, () => left.push("left")));
  await Bun.sleep(5);
  expect(requests).toEqual([]);
  expect(device.accessCalls).toEqual([]);
  expect(revived.address).toBe(ENTRY.address);
  expect(revived.snapshot().data).toEqual(kept.data);
  expect([...revived.snapshot().fds.keys()]).toEqual([...kept.fds.keys()]);

  expect(await revived.region(PLACES.whole.index).read(0x20, 4)).toBe(0x1234_5678);
  expect(await mappings()).toBe(1);
  expect(await revived.config.read(8, 4)).toBe(0x0100_0001);
  device.fire(IrqIndex.msix, 2);
  expect(drainEventfd(call.number)).toBe(1);
  expect(requests).toEqual([]);
  using other = eventfd();
  expect(revived.interrupts.count).toBe(4);
  await revived.interrupts.route(3, other.number);
  device.fire(IrqIndex.msix, 2);
  device.fire(IrqIndex.msix, 3);
  expect([drainEventfd(call.number), drainEventfd(other.number)]).toEqual([1, 1]);
  using kick = eventfd();
  signalEventfd(kick.number);
  using _connected = revived.doorbell(PLACES.whole.index, 0x3004).connect(kick.number, 7);
  expect(await eventually(() => device.peek(PLACES.whole.offset + 0x3004, 1)[0] === 7)).toBe(true);
  await revived.reset(soon());
  expect(device.resets).toBe(1);
  expect(requests).toEqual([DeviceRequest.setIrqs, DeviceRequest.reset]);
  await revived[Symbol.asyncDispose]();
  expect(left).toEqual(["left"]);
});

test("one that was lent stays so: nothing of it is mapped, and its kicks are not the relay's", async () => {
  const { device, fn } = await open();
  expect(fn.doorbell(PLACES.whole.index, 0x3004).share()).toBeDefined();
  const kept = stored(fn);
  fn.abandon();
  const revived = use(revive(device, kept));
  expect(revived.snapshot().data).toMatchObject({ lent: true });
  const bar = revived.region(PLACES.whole.index);
  await bar.write(0, 4, 5);
  expect(await bar.read(0, 4)).toBe(5);
  expect(await mappings()).toBe(0);
  using kick = eventfd();
  device.accessCalls.length = 0;
  using _connected = revived.doorbell(PLACES.whole.index, 0x3004).connect(kick.number, 9);
  signalEventfd(kick.number);
  expect(await eventually(() => device.peek(PLACES.whole.offset + 0x3004, 1)[0] === 9)).toBe(true);
  expect(device.accessCalls).toEqual([1]);
});

test("one that cannot be reset, or has no error interrupt, stays so", async () => {
  const { device, fn } = await open((one) => {
    one.canReset = false;
    one.isExpress = false;
  });
  const kept = stored(fn);
  expect([...kept.fds.keys()]).toEqual(["device", "request"]);
  fn.abandon();
  const revived = use(revive(device, kept));
  expect(revived.doorbell(PLACES.whole.index, 0x3004).share()).toBeUndefined();
  device.fire(IrqIndex.request, 0);
  expect((await soon().race(revived.lost)).message).toContain("wanted back by the kernel");
});

test.each([
  ["an error of the device", IrqIndex.error, "AER"],
  ["the kernel wants it back", IrqIndex.request, "unplugged"],
] as const)("that it is lost is told, also where it was while nobody looked: %s", async (_name, index, message) => {
  const { device, fn } = await open();
  const kept = stored(fn);
  fn.abandon();
  device.fire(index, 0);
  const revived = use(revive(device, kept));
  expect((await soon().race(revived.lost)).message).toContain(message);
  await revived[Symbol.asyncDispose]();
});

test("that it does not answer any more is told", async () => {
  const { device, fn } = await open();
  const kept = stored(fn);
  fn.abandon();
  device.fallSilent();
  const revived = use(revive(device, kept));
  expect((await soon(5000).race(revived.lost)).message).toContain("reads all ones");
});

test("records and fds that do not fit are refused; all is closed, and it is left", async () => {
  const { device, fn } = await open();
  const kept = stored(fn);
  fn.abandon();
  const good = kept.data as { readonly [name: string]: Json };
  const before = liveFds();
  const left: string[] = [];
  const attempt = (data: Json, fds = kept.fds) => {
    return () => void revive(device, { data, fds }, () => left.push("left"))[Symbol.asyncDispose]();
  };
  const bad = [
    null,
    {},
    { ...good, vectors: 4096 },
    { ...good, lent: 0 },
    { ...good, bars: [] },
    { ...good, config: { size: -1, fileOffset: 0, areas: [] } },
    { ...good, msix: [{ bar: 9, offset: 0, size: 1 }] },
  ];
  for (const data of bad) expect(attempt(data)).toThrow("the stored function is not understood");
  const without = new Map([...kept.fds].filter(([name]) => name !== "device"));
  expect(attempt(good, without)).toThrow("lacks the descriptor device");
  const more = new Map([...kept.fds, ["doorbell", kept.fds.get("device")!]]);
  expect(attempt(good, more)).toThrow("spare fds: doorbell");
  expect(left).toHaveLength(bad.length + 2);
  expect(liveFds()).toBe(before);
});
