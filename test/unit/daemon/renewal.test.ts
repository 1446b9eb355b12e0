import { expect, test } from "bun:test";
import { liveFds } from "../../../src/native/fd.ts";
import { rejection } from "../../kit/rejection.ts";
import { KernelBus, PLAIN } from "./kernel-bus.ts";

/** Functions whose doorbells a front-end was given, which can drive them by their file as long as it likes. */

const HELD = "held by process 4711";

function count(bus: KernelBus, step: string): number {
  return bus.steps.filter((done) => done === `${step} ${PLAIN}`).length;
}

/** A guest that was given doorbells comes and goes. */
async function lend(bus: KernelBus): Promise<void> {
  using guest = await bus.guest(PLAIN);
  await guest.backendRequests!.wait(2);
}

const idle = (bus: KernelBus) => () => bus.registry.vfInfo(PLAIN).state === "idle";

test("is closed and opened again before the next front-end", async () => {
  await using bus = await KernelBus.create();
  const added = await bus.add(PLAIN);
  const [first, fds] = [bus.fn(PLAIN), liveFds()];
  await lend(bus);
  await bus.until(() => bus.fn(PLAIN) !== first && idle(bus)());
  const steps = bus.steps.map((step) => step.replace(` ${PLAIN}`, ""));
  expect(steps.slice(steps.indexOf("unmap master"))).toEqual([
    ...["unmap master", "reset", "detach", "close", "end of the space"],
    ...["open", "attach cut off"],
  ]);
  expect(bus.registry.vfInfo(PLAIN)).toEqual(added);
  expect(await bus.keeper.list()).toEqual([`vf/${PLAIN}`]);
  expect(liveFds()).toBe(fds);
  using _second = await bus.guest(PLAIN);
  await bus.registry.removeVf(PLAIN);
  expect(bus.registry.listVfs()).toEqual([]);
});

test("stays open where none of it was given away", async () => {
  await using bus = await KernelBus.create();
  await bus.add(PLAIN, { unmanaged: true, hostNotifier: false });
  (await bus.guest(PLAIN))[Symbol.dispose]();
  await bus.until(() => idle(bus)() && !bus.registry.vfInfo(PLAIN).connected);
  using _second = await bus.guest(PLAIN);
  expect([count(bus, "open"), count(bus, "close")]).toEqual([1, 0]);
});

test("serves nobody while somebody still holds it, says who that is, and is served when it ends", async () => {
  await using bus = await KernelBus.create({ renew: 1 });
  await bus.add(PLAIN);
  bus.heldBy = HELD;
  await lend(bus);
  await bus.until(() => bus.registry.vfInfo(PLAIN).reason?.includes(HELD) === true);
  expect(bus.registry.vfInfo(PLAIN)).toMatchObject({ state: "attaching", connected: false });
  expect(bus.registry.listVfs()).toHaveLength(1);
  expect(await bus.registry.vfStats(PLAIN)).toBeNull();
  expect(await rejection(bus.add(PLAIN))).toMatchObject({ code: "vfExists" });
  expect(await rejection(bus.guest(PLAIN))).toBeInstanceOf(Error);
  bus.heldBy = undefined;
  await bus.until(idle(bus));
  expect(bus.registry.vfInfo(PLAIN).reason).toBeNull();
  expect(bus.events.filter(({ reason }) => String(reason).includes(HELD))).toHaveLength(1);
  using _second = await bus.guest(PLAIN);
});

test("is removed while it waits to be opened again, with a warning of who holds it", async () => {
  await using bus = await KernelBus.create();
  const fds = liveFds();
  await bus.add(PLAIN);
  bus.heldBy = HELD;
  await lend(bus);
  await bus.until(() => bus.registry.vfInfo(PLAIN).reason !== null);
  expect(await bus.registry.removeVf(PLAIN)).toContain(HELD);
  expect([count(bus, "open"), count(bus, "close")]).toEqual([1, 1]);
  expect(bus.registry.listVfs()).toEqual([]);
  expect(await bus.keeper.list()).toEqual([]);
  expect(liveFds()).toBe(fds);
  bus.heldBy = undefined;
  expect(await bus.add(PLAIN)).toMatchObject({ state: "idle" });
});

test("is removed and stopped in the midst of being closed", async () => {
  await using bus = await KernelBus.create({ close: 20 });
  const closing = Promise.withResolvers<void>();
  bus.slowClose = closing.promise;
  await bus.add(PLAIN);
  await lend(bus);
  await bus.until(() => count(bus, "close") === 1);
  expect(await bus.registry.removeVf(PLAIN)).toBeUndefined();
  expect(await rejection(bus.add(PLAIN))).toMatchObject({ code: "busy" });
  closing.resolve();
  await bus.until(() => bus.steps.at(-1) === "end of the space");
  expect(count(bus, "open")).toBe(1);
});

test("a removal under its guest warns where the guest's process can go on using it", async () => {
  await using bus = await KernelBus.create();
  await bus.add(PLAIN);
  using guest = await bus.guest(PLAIN);
  await guest.backendRequests!.wait(2);
  bus.heldBy = HELD;
  expect(await bus.registry.removeVf(PLAIN)).toContain(HELD);
  expect(count(bus, "open")).toBe(1);
});

test("changes of the configuration are heard of whatever was done to their vector before a start", async () => {
  await using bus = await KernelBus.create();
  await bus.add(PLAIN);
  await bus.fn(PLAIN).interrupts.route(0, null);
  using _guest = await bus.guest(PLAIN);
  expect(bus.fn(PLAIN).routes.has(0)).toBe(true);
});
