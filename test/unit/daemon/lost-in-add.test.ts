import { expect, test } from "bun:test";
import { Deadline } from "../../../src/base/deadline.ts";
import { whileThere } from "../../../src/daemon/while-there.ts";
import { liveFds } from "../../../src/native/fd.ts";
import type { PciAddress } from "../../../src/pci/address.ts";
import { FakeFunction } from "../../kit/fake-function.ts";
import { rejection } from "../../kit/rejection.ts";
import { KernelBus, PF, PLAIN } from "./kernel-bus.ts";

/** Functions that are unplugged while they are being added: the kernel waits until they are closed. */

const adds = {
  VF: { address: PLAIN, add: (bus: KernelBus) => bus.add(PLAIN) },
  PF: { address: PF, add: (bus: KernelBus) => bus.registry.addPf(PF) },
};

for (const [kind, { address, add }] of Object.entries(adds)) {
  test(`a ${kind} that is lost while it does not answer is closed at once, with that reason`, async () => {
    await using bus = await KernelBus.create({ attach: 60_000, admin: 60_000 });
    const fds = liveFds();
    onOpen(bus, address, (fn) => {
      // Its configuration space is never read to the end.
      fn.config.readBytes = () => new Promise(() => {});
      fn.config.read = () => new Promise(() => {});
      setTimeout(() => fn.lose(new Error("unplugged")), 1);
    });
    expect((await rejection(add(bus))).message).toContain("unplugged");
    expect(bus.steps).toContain(`close ${address}`);
    expect(liveFds()).toBe(fds);
  });
}

test("a VF that is lost in its first reset is closed at once, with that reason", async () => {
  await using bus = await KernelBus.create({ attach: 60_000 });
  onOpen(bus, PLAIN, (fn) => {
    fn.status = 1;
    fn.faults.resetNeverEnds = true;
    setTimeout(() => fn.lose(new Error("unplugged")), 20);
  });
  expect((await rejection(bus.add(PLAIN))).message).toContain("unplugged");
  expect(bus.steps).toContain(`close ${PLAIN}`);
});

test("steps end as they do while the function is there; after a loss their deadline has passed", async () => {
  const fn = new FakeFunction();
  const deadline = Deadline.after(60_000, "steps");
  expect(await whileThere(fn, deadline, async () => 7)).toBe(7);
  const failing = () => Promise.reject(new Error("no"));
  expect((await rejection(whileThere(fn, deadline, failing))).message).toBe("no");
  const done = async () => {
    fn.lose(new Error("unplugged"));
    await Bun.sleep(1);
  };
  expect((await rejection(whileThere(fn, deadline, done))).message).toBe("unplugged");
  expect(deadline.expired).toBe(true);
});

type Opened = ReturnType<KernelBus["fn"]>;

/** Before anything else is done with the function. */
function onOpen(bus: KernelBus, address: PciAddress, then: (fn: Opened) => void): void {
  const { functions } = bus;
  const set = functions.set.bind(functions);
  functions.set = (key, fn) => {
    if (key === address) then(fn);
    return set(key, fn);
  };
}
