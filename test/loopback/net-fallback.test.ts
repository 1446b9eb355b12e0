import { expect, test } from "bun:test";
import { Deadline } from "../../src/base/deadline.ts";
import type { NetGuest } from "../kit/net/net-guest.ts";
import { NetLab } from "../kit/net/net-lab.ts";
import { rejection } from "../kit/rejection.ts";

/** A guest whose VF changes hands: its PF answers no more for a while, or an operator holds the device. */

const PATIENCE = 10_000;

/** Frames come back by all pairs in use. */
async function flows(guest: NetGuest): Promise<void> {
  for (const stream of guest.streams(guest)) {
    await stream.progress(20);
    await stream.stop();
  }
}

test("started and stopped by its registers, a VF goes on by its PF, with more pairs", async () => {
  await using lab = await NetLab.create({ vfs: 1, backend: "echo", deadlines: { start: 500 } });
  const { daemon } = lab;
  const managed = () => daemon.registry.vfInfo(daemon.vf).managed;
  await daemon.set(daemon.pf, { "admin-delay": "restore=3000" });
  const options = { pairs: 4, enabled: 1 };
  await rejection(lab.boot(0, options));
  await lab.idle(0);
  await daemon.set(daemon.pf, { "admin-delay": "" });
  using guest = await lab.boot(0, options);
  await flows(guest);
  const bases = await guest.frontend.stop({ order: "new" });
  expect(bases.slice(2)).toEqual([0, 0, 0, 0, 0, 0]);
  expect(managed()).toBe(false);
  await Deadline.after(PATIENCE, "the answer of the PF").poll(() => managed() || undefined, 20);
  await guest.frontend.resumeQueues(bases);
  await flows(guest);
  await guest.frontend.useOnly(4);
  await flows(guest);
  expect(await guest.frontend.stop({ order: "new" })).toEqual(guest.usedIndices);
}, 30_000);

test("held by an operator, a VF stays held while its guest enables pairs, which work afterwards", async () => {
  await using lab = await NetLab.create({ vfs: 1, backend: "echo" });
  const { registry, vf } = lab.daemon;
  using guest = await lab.boot(0, { pairs: 4, enabled: 1 });
  for (const [hold, held, pairs] of [
    ["quiesce", "quiesced", 2],
    ["freeze", "freezed", 4],
  ] as const) {
    await registry.moveVf(vf, hold);
    await guest.frontend.useOnly(pairs);
    expect(await registry.moveVf(vf, "status")).toBe(held);
    await registry.moveVf(vf, "run");
    await flows(guest);
  }
}, 30_000);
