import { afterEach, expect } from "bun:test";
import { Deadline } from "../../../src/base/deadline.ts";
import { liveFds } from "../../../src/native/fd.ts";
import type { DeviceClass } from "../../../src/plugin.ts";
import { featureBits } from "../../../src/virtio/features.ts";
import { VendorMover } from "../../../src/virtio/movers/vendor.ts";
import { FakeAdmin } from "../../kit/fake-admin.ts";
import { fakeClass } from "../../kit/fake-class.ts";
import { FakeFunction } from "../../kit/fake-function.ts";
import type { FakeVf } from "../../kit/fake-vf.ts";
import { moverHost } from "./mover-host.ts";
import { FakeRings, wantedState } from "./states.ts";

/** What the tests of the vendor's mover have in common. */

export const soon = (ms = 2000) => Deadline.after(ms, "the test");
const undo: AsyncDisposable[] = [];

/** After the test, last first. */
export function disposeLater(one: AsyncDisposable): void {
  undo.push(one);
}

export async function disposeAll(): Promise<void> {
  for (const one of undo.splice(0).reverse()) await one[Symbol.asyncDispose]();
}

/** To be called once by each file. */
export function cleanUpAfterEach(): void {
  afterEach(async () => {
    await disposeAll();
    expect(liveFds()).toBe(0);
  });
}

/** A VF of this class whose PF moves it. */
export async function setUp(queues = 2, members: Partial<DeviceClass> = {}, config = new Uint8Array(60)) {
  const pf = new FakeAdmin();
  undo.push(pf);
  const admin = await pf.open();
  const fn = new FakeFunction({ queues, features: featureBits(6), config });
  const host = await moverHost(fn, { deviceClass: fakeClass(members) });
  const vf = pf.vfs[0]!;
  vf.fn = fn;
  const managed = { admin, vdevId: 1 };
  return { pf, fn, vf, host, managed, mover: new VendorMover(host, managed), rings: new FakeRings() };
}

export type Parts = Awaited<ReturnType<typeof setUp>>;

/** Running with these queues at `base`, as the guest's memory says too. */
export async function running(queues = 2, base = 0, members: Partial<DeviceClass> = {}) {
  const parts = await setUp(queues, members);
  await parts.mover.configure(wantedState(queues, base), soon());
  for (let queue = 0; queue < queues; queue++) parts.rings.set(queue, { available: base, used: base });
  parts.vf.steps.length = 0;
  return parts;
}

/** The device has done this much, as it will say when it is saved. */
export function advance(
  { vf, rings }: Pick<Parts, "vf" | "rings">,
  queue: number,
  lastAvail: number,
  lastUsed: number,
  inMemory = lastUsed,
) {
  const state = vf.state!;
  vf.state = {
    ...state,
    indices: state.indices.map((one) => (one.index === queue ? { index: queue, lastAvail, lastUsed } : one)),
  };
  rings.set(queue, { available: lastAvail, used: inMemory });
}

/** The device will say so when it is saved. */
export function with_(vf: FakeVf, change: Partial<NonNullable<FakeVf["state"]>>): void {
  vf.state = { ...vf.state!, ...change };
}
