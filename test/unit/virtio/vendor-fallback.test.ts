import { expect, test } from "bun:test";
import { toVendorState } from "../../../src/virtio/admin/vendor-state.ts";
import { type DeviceState, withEnabled } from "../../../src/virtio/device-state.ts";
import { PciCommand, PciConfig } from "../../../src/virtio/registers.ts";
import { rejection } from "../../kit/rejection.ts";
import { wantedState } from "./states.ts";
import { cleanUpAfterEach, setUp, soon } from "./vendor-lab.ts";

/** A VF that its registers started, while its PF owed an answer, and that its PF moves afterwards. */

cleanUpAfterEach();

/** Queue 0 receives, queue 1 does not. */
async function begunByRegisters(wanted = wantedState(2)) {
  const parts = await setUp(2, { receives: (queue) => queue === 0 });
  const { pf, mover, vf, host, fn } = parts;
  pf.answer = (asked) => (asked.name === "modifyStatus" ? "silence" : pf.honest(asked));
  await rejection(mover.configure(wantedState(2, 5), soon(50)));
  pf.answer = (asked) => pf.honest(asked);
  await mover.configure(wanted, soon());
  return {
    ...parts,
    async pfIsBack() {
      pf.complete(pf.commands("modifyStatus")[0]!.head);
      await soon().poll(() => mover.capabilities.resumeAnywhere || undefined, 1);
    },
    /** What the device will save: all queues, which the registers have set up. */
    saves(state: DeviceState) {
      vf.state = toVendorState(withEnabled(state, new Set([0, 1])), host, 0);
    },
    isMaster: () => (fn.configBytes[PciConfig.command]! & PciCommand.busMaster) !== 0,
  };
}

test("one that they stopped too reaches memory again, whether it goes on or begins anew", async () => {
  for (const then of ["on", "elsewhere", "anew"] as const) {
    const { mover, rings, vf, pfIsBack, saves, isMaster } = await begunByRegisters();
    rings.set(0, { available: 100, used: 4 });
    rings.set(1, { available: 3, used: 3 });
    const state = await mover.freeze(rings, "drained", soon());
    await pfIsBack();
    saves(state);
    expect(isMaster()).toBe(false);
    if (then === "anew") await mover.reset(soon());
    await mover.configure(then === "on" ? state : wantedState(2, 9), soon());
    expect(vf.restored.length).toBe(then === "on" ? 0 : 1);
    expect([vf.status, isMaster()]).toEqual(["running", true]);
  }
});

test("queues that were disabled are no surprise, and stand where they were used last", async () => {
  const { mover, rings, vf, pfIsBack, saves } = await begunByRegisters(withEnabled(wantedState(2), new Set([0])));
  await mover.enable(new Set([0, 1]), rings, soon());
  rings.set(1, { available: 6, used: 6 });
  await mover.enable(new Set([0]), rings, soon());
  await pfIsBack();
  rings.set(0, { available: 20, used: 4 });
  const { queues } = wantedState(2);
  saves({
    ...wantedState(2),
    queues: queues.map((queue, i) => ({ ...queue, lastAvail: [4, 6][i]!, lastUsed: [4, 6][i]! })),
  });
  await mover.enable(new Set([0, 1]), rings, soon());
  expect(vf.restored[0]).toMatchObject({
    queues: [{ enable: 1 }, { enable: 1 }],
    indices: [
      { lastAvail: 4, lastUsed: 4 },
      { lastAvail: 6, lastUsed: 6 },
    ],
  });
});

test("one whose PF does not answer when it is to be frozen is stopped by its registers, and goes on", async () => {
  const { pf, mover, rings, vf, host } = await setUp(2, { receives: (queue) => queue === 0 });
  await mover.configure(wantedState(2, 5), soon());
  vf.state = toVendorState(wantedState(2, 5), host, 0);
  rings.set(0, { available: 90, used: 30 });
  rings.set(1, { available: 12, used: 12 });
  pf.answer = (asked) => (asked.name === "modifyStatus" ? "silence" : pf.honest(asked));
  const asked = pf.commands("modifyStatus").length;
  const state = await mover.freeze(rings, "drained", soon(400));
  expect(pf.commands("modifyStatus").length).toBe(asked + 1);
  expect(state.queues.map(({ lastAvail, lastUsed }) => [lastAvail, lastUsed])).toEqual([
    [30, 30],
    [12, 12],
  ]);
  const restored = vf.restored.length;
  await mover.configure(state, soon());
  expect(mover.snapshot().kind).toBe("running");
  expect(vf.restored.length).toBe(restored);
});
