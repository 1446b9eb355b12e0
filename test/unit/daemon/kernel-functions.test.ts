import { describe, expect, test } from "bun:test";
import { VhostdError } from "../../../src/base/errors.ts";
import { liveFds } from "../../../src/native/fd.ts";
import { ProtocolFeature } from "../../../src/vhost-user/messages.ts";
import type { MemoryKeeper } from "../../kit/memory-keeper.ts";
import { rejection } from "../../kit/rejection.ts";
import { KernelBus, PF, PLAIN, VF } from "./kernel-bus.ts";

/** The keeper knows that the VF is there, and has nothing of its function. */
async function expectHollow(keeper: MemoryKeeper): Promise<void> {
  expect(await keeper.list()).toEqual([`vf/${PLAIN}`]);
  const stored = await keeper.get(`vf/${PLAIN}`);
  expect(stored?.record).toMatchObject({ function: null });
  expect(stored?.fds.size).toBe(0);
}

/** Functions of this machine in the daemon's hands, with a kernel and devices made of JavaScript. */

describe("without a PF", () => {
  test("a function is served where the operator says so; otherwise the refusal names the way", async () => {
    await using bus = await KernelBus.create();
    for (const [address, number, way] of [
      [PLAIN, 1003, "--unmanaged"],
      [VF, 1001, `mgmtpf -a ${PF} first`],
    ] as const) {
      const refused = await rejection(bus.add(address, {}));
      expect(refused).toMatchObject({ number, fix: expect.stringContaining(way) });
      expect(await bus.add(address)).toMatchObject({
        ...{ vf: address, pf: address === VF ? PF : null, unmanaged: true },
        ...{ mover: "registers", managed: false, unmanaged_reason: expect.stringContaining("--unmanaged") },
        ...{ interface: "group", iommu_group: 7, numa_node: 1, host_notifier: true },
      });
    }
    expect(bus.registry.listVfs().map(({ vf }) => vf)).toEqual([PLAIN, VF]);
    expect(await rejection(bus.registry.addPf(PLAIN))).toMatchObject({ code: "pfExists" });
    expect(bus.events.filter(({ state }) => state === "idle").map(({ vf }) => vf)).toEqual([PLAIN, VF]);
  });

  test("a PF is neither opened nor closed while a VF of it is served, and serves no guest while it has VFs", async () => {
    await using bus = await KernelBus.create();
    const { registry } = bus;
    await bus.add(VF);
    using _guest = await bus.guest(VF);
    expect(await rejection(registry.addPf(PF))).toMatchObject({ code: "busy", fix: expect.stringContaining(VF) });
    expect(await rejection(bus.add(PF))).toMatchObject({ code: "busy", fix: expect.stringContaining("sriov") });
    expect(bus.steps.filter((step) => step.includes(PF))).toEqual([]);
    await registry.removeVf(VF);

    expect(await registry.addPf(PF)).toMatchObject({ vfs: 0, kind: "vfio", managed: false });
    expect(await rejection(bus.add(PF))).toMatchObject({ fix: expect.stringContaining("mgmtpf -r") });
    expect(await bus.add(VF, {})).toMatchObject({ unmanaged: false, mover: "registers" });
    expect(await rejection(registry.removePf(PF))).toMatchObject({ code: "pfHasVfs" });
    bus.fn(PF).lose(new VhostdError("io", "reported an error that it does not recover from (AER)"));
    await bus.until(() => registry.listPfs()[0]?.reason !== null);
    await Bun.sleep(20);
    expect(bus.steps).not.toContain(`close ${PF}`);
    await registry.removeVf(VF);
    await registry.removePf(PF);
    expect(bus.steps).toContain(`close ${PF}`);
  });

  test("a VF is not opened while its PF is being closed", async () => {
    await using bus = await KernelBus.create();
    const gate = Promise.withResolvers<void>();
    bus.slowClose = gate.promise;
    await bus.registry.addPf(PF);
    bus.slowClose = Promise.resolve();
    const removing = bus.registry.removePf(PF);
    expect(await rejection(bus.add(VF))).toMatchObject({ code: "busy" });
    gate.resolve();
    await removing;
    expect(await bus.add(VF)).toMatchObject({ state: "idle" });
  });
});

test("a function reaches memory between the first set-up and the end of its session, and is let go of in order", async () => {
  await using bus = await KernelBus.create();
  await bus.add(PLAIN, { unmanaged: true, hostNotifier: false });
  const fn = bus.fn(PLAIN);
  expect(fn.isMaster).toBe(false);
  {
    using _guest = await bus.guest(PLAIN);
    expect(fn.isMaster).toBe(true);
  }
  await bus.until(() => bus.registry.vfInfo(PLAIN).state === "idle" && !bus.registry.vfInfo(PLAIN).connected);
  expect(fn.status).toBe(0);
  await bus.registry.removeVf(PLAIN);
  expect(bus.steps.map((step) => step.replace(` ${PLAIN}`, ""))).toEqual([
    ...["open", "attach cut off", "map", "unmap master"],
    ...["detach", "close", "end of the space"],
  ]);
});

describe("host notifier", () => {
  test("doorbells go to the front-end, and the function is reset before it is closed", async () => {
    await using bus = await KernelBus.create();
    await bus.add(PLAIN);
    using guest = await bus.guest(PLAIN);
    expect(guest.has(ProtocolFeature.HOST_NOTIFIER)).toBe(true);
    await guest.backendRequests!.wait(2);
    await bus.registry.removeVf(PLAIN);
    expect(bus.steps.indexOf(`reset ${PLAIN}`)).toBeGreaterThan(0);
    expect(bus.steps.indexOf(`reset ${PLAIN}`)).toBeLessThan(bus.steps.indexOf(`close ${PLAIN}`));
  });

  test("none where the operator wants none, and no reset that the kernel does anyway", async () => {
    await using bus = await KernelBus.create();
    expect(await bus.add(PLAIN, { unmanaged: true, hostNotifier: false })).toMatchObject({ host_notifier: false });
    using guest = await bus.guest(PLAIN);
    expect(guest.has(ProtocolFeature.HOST_NOTIFIER)).toBe(false);
    await bus.registry.removeVf(PLAIN);
    expect(bus.steps).not.toContain(`reset ${PLAIN}`);
  });
});

describe("a function that is lost", () => {
  const ways = {
    unplugged: (bus: KernelBus) => bus.fn(PLAIN).lose(new Error("unplugged")),
    silent: (bus: KernelBus) => {
      bus.fn(PLAIN).faults.silent = true;
      bus.fn(PLAIN).interruptConfig();
    },
  };
  for (const [way, lose] of Object.entries(ways)) {
    test(`${way}: under a guest fails with the reason, and nothing of it is held any more`, async () => {
      await using bus = await KernelBus.create();
      const fds = liveFds();
      await bus.add(PLAIN);
      {
        using guest = await bus.guest(PLAIN);
        lose(bus);
        await guest.hungUp();
      }
      await bus.until(() => bus.steps.includes("end of the space"));
      const reason = expect.stringMatching(/unplugged|all ones/);
      expect(bus.registry.vfInfo(PLAIN)).toMatchObject({ state: "failed", reason });
      expect(bus.events.at(-1)).toMatchObject({ vf: PLAIN, state: "failed", reason });
      expect(
        bus.steps
          .slice(3)
          .map((step) => step.replace(` ${PLAIN}`, ""))
          .filter((step) => step !== "reset"),
      ).toEqual([...["unmap cut off", "detach", "close", "end of the space"]]);
      expect(await bus.registry.vfStats(PLAIN)).toBeNull();
      await expectHollow(bus.keeper);
      expect(liveFds()).toBe(fds);
      await bus.registry.removeVf(PLAIN);
      expect(await bus.keeper.list()).toEqual([]);
      expect(await bus.add(PLAIN)).toMatchObject({ state: "idle" });
      using _again = await bus.guest(PLAIN);
    });
  }

  test("without a guest is closed too", async () => {
    await using bus = await KernelBus.create();
    await bus.add(PLAIN);
    bus.fn(PLAIN).lose(new Error("unplugged"));
    await bus.until(() => bus.steps.includes("end of the space"));
    await expectHollow(bus.keeper);
    await bus.registry.removeVf(PLAIN);
    expect(bus.steps.filter((step) => step === `close ${PLAIN}`)).toHaveLength(1);
  });

  test("is removed in time, and once, where the kernel takes its time to close it", async () => {
    await using bus = await KernelBus.create({ close: 20 });
    for (const fail of [false, true]) {
      const closing = Promise.withResolvers<void>();
      bus.slowClose = closing.promise;
      await bus.add(PLAIN);
      if (fail) bus.fn(PLAIN).lose(new Error("unplugged"));
      if (fail) await bus.until(() => bus.registry.vfInfo(PLAIN).state === "failed");
      await bus.registry.removeVf(PLAIN);
      expect(bus.registry.listVfs()).toEqual([]);
      expect(await rejection(bus.add(PLAIN))).toMatchObject({ code: "busy" });
      closing.resolve();
      bus.slowClose = Promise.resolve();
      await bus.until(() => bus.steps.at(-1) === "end of the space");
      await bus.add(PLAIN);
      expect(bus.steps.filter((step) => step === `close ${PLAIN}`)).toHaveLength(fail ? 3 : 1);
      expect(await bus.keeper.list()).toEqual([`vf/${PLAIN}`]);
      await bus.registry.removeVf(PLAIN);
    }
  });

  test("a PF is removed in time, too, and not opened before it is closed", async () => {
    await using bus = await KernelBus.create({ close: 20 });
    const closing = Promise.withResolvers<void>();
    bus.slowClose = closing.promise;
    await bus.registry.addPf(PF);
    await bus.registry.removePf(PF);
    expect(bus.registry.listPfs()).toEqual([]);
    expect(await rejection(bus.registry.addPf(PF))).toMatchObject({ code: "busy" });
    closing.resolve();
    bus.slowClose = Promise.resolve();
    await bus.until(() => bus.steps.at(-1) === "end of the space");
    await bus.registry.addPf(PF);
  });

  test("a PF is closed, is removed when its VFs are, and is added again", async () => {
    await using bus = await KernelBus.create();
    const { registry } = bus;
    await registry.addPf(PF);
    await bus.add(VF, {});
    bus.fn(PF).lose(new Error("unplugged"));
    await bus.until(() => bus.steps.includes(`close ${PF}`));
    expect(registry.listPfs()).toMatchObject([{ pf: PF, reason: "unplugged", vfs: 1 }]);
    await bus.until(() => bus.events.some(({ pf, state }) => pf === PF && state === "gone"));
    expect(await bus.keeper.list()).toEqual([`vf/${VF}`]);
    expect(await rejection(registry.removePf(PF))).toMatchObject({ code: "pfHasVfs" });
    expect(registry.vfInfo(VF).state).toBe("idle");
    await registry.removeVf(VF);
    await registry.removePf(PF);
    expect(await registry.addPf(PF)).toMatchObject({ reason: expect.stringContaining("ADMIN_VQ") });
  });
});
