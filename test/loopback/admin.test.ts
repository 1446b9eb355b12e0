import { expect, test } from "bun:test";
import { Deadline } from "../../src/base/deadline.ts";
import { asError } from "../../src/base/errors.ts";
import { OwnedFd } from "../../src/native/fd.ts";
import { type PciAddress, parsePciAddress } from "../../src/pci/address.ts";
import { DmaDomain } from "../../src/pci/dma-domain.ts";
import { VfioUserAddressSpace } from "../../src/pci/vfio-user/address-space.ts";
import { VfioUserFunction } from "../../src/pci/vfio-user/function.ts";
import { RpcClient } from "../../src/rpc/client.ts";
import { controlSocket } from "../../src/softvf/config.ts";
import { AdminQueue } from "../../src/virtio/admin/admin-queue.ts";
import { type AdminTimeouts, openAdmin } from "../../src/virtio/admin/open-admin.ts";
import { VendorAdmin } from "../../src/virtio/admin/vendor-admin.ts";
import { VirtioPciDevice } from "../../src/virtio/pci-device.ts";
import { deathOf } from "../kit/fake-admin.ts";
import { rejection } from "../kit/rejection.ts";
import { ManagedGuest } from "./managed-guest.ts";
import type { Reachable } from "./softvf-driver.ts";
import { serve, workspace } from "./softvf-process.ts";

const PF = "0000:5a:00.0";
const soon = (ms = 10_000) => Deadline.after(ms, "the test");

/** A real vfe-softvf, and the driver of its PF. VFs have their numbers, from 0. */
async function manage(vfs: number, options: readonly string[] = [], timeouts: AdminTimeouts = {}) {
  await using stack = new AsyncDisposableStack();
  const space = stack.use(await workspace("disk"));
  const place = ["--runtime-dir", space.path("run")];
  const args = ["--pf", PF, "--class", "blk", "--vfs", String(vfs), "--disk", space.path("disk"), "--size", "16M"];
  stack.use(await serve(...args, "--queues", "2", ...options, ...place));
  const socket = (address: string) => space.path(`run/devices/${address}/vfio-user.sock`);
  const fn = stack.use(await VfioUserFunction.connect(parsePciAddress(PF), socket(PF), soon()));
  const device = await VirtioPciDevice.probe(fn, soon());
  const domain = new DmaDomain(new VfioUserAddressSpace());
  stack.defer(() => domain.abandon());
  await domain.attach(fn);
  const deviceClass = { configSpace: {}, adminQueue: () => 0 };
  const found = await openAdmin(device, domain, deviceClass, soon(), {
    retry: 20,
    ...timeouts,
  });
  if (found.kind === "vendor") stack.use(found.admin.queue);
  const resources = stack.move();
  return {
    found,
    device,
    vf: (index: number): Reachable => {
      const address = `0000:5a:00.${index + 1}`;
      return { address: parsePciAddress(address) as PciAddress, server: { path: socket(address) } };
    },
    /** Admin commands go wrong from now on, as the PF's option says it. */
    fault: async (adminFault: string) => {
      using client = await RpcClient.connect(controlSocket(space.path("run")), soon());
      await client.call("set", { address: PF, options: { "admin-fault": adminFault } }, soon());
    },
    [Symbol.asyncDispose]: () => resources.disposeAsync(),
  };
}

async function managed(...args: Parameters<typeof manage>) {
  const softvf = await manage(...args);
  if (softvf.found.kind === "none") throw new Error(softvf.found.reason);
  return { ...softvf, admin: softvf.found.admin };
}

test("what a PF can do is found out", async () => {
  await using vendor = await manage(1);
  expect(vendor.found).toMatchObject({ kind: "vendor", version: "1.0.0" });
  await using none = await manage(1, ["--migration", "none"]);
  expect(none.found).toEqual({ kind: "none", reason: "the PF does not offer ADMIN_VQ" });
}, 20_000);

test("many commands on several VFs are in flight together", async () => {
  await using softvf = await managed(4, ["--admin-delay", "status=5"]);
  const { admin } = softvf;
  for (const vdev of [2, 4]) await admin.modify(vdev, "quiesced", soon());
  const asked = Array.from({ length: 120 }, (_, i) => admin.status(1 + (i % 4), soon()));
  const expected = ["init", "quiesced", "init", "quiesced"];
  expect(await Promise.all(asked)).toEqual(Array.from({ length: 120 }, (_, i) => expected[i % 4] as "init"));
}, 20_000);

test("every fault of one VF's command ends in a stated outcome in time, and other VFs are unharmed", async () => {
  await using softvf = await managed(2);
  const { admin } = softvf;
  await using guest = await ManagedGuest.connect(softvf.vf(0), admin, 1, 40_000);
  await using other = await ManagedGuest.connect(softvf.vf(1), admin, 2);
  await other.start();
  other.load(2);
  const start = () => guest.start(500);
  const stop = () => guest.stop("drained", 500);
  const outcomes: [string, () => Promise<unknown>, object?][] = [
    ["status@0:retry:2", start],
    ["save@0:retry:2", stop],
    ["modify@0:fail", start, { code: "quiesceFailed" }],
    ["restore@0:fail", start, { code: "io", message: expect.stringMatching(/refused restore of virtfn0: internal/) }],
    ["", start],
    ["modify@0:retry", stop, { code: "quiesceFailed", message: expect.stringMatching(/also after \d+ more tries/) }],
    ["pending@0:fail", stop, { code: "stateSave" }],
    ["save@0:fail", stop, { code: "stateSave" }],
    ["save@0:silence", stop, { code: "stateSave", message: expect.stringMatching(/did not answer save of virtfn0/) }],
    ["modify@0:silence", start, { code: "invalid", message: expect.stringMatching(/is running already/) }],
    ["", stop],
    ["modify@0:silence:1", start, { code: "quiesceFailed" }],
    // Whatever became of that change: the VF begins anew or not at all.
    ["", start, { code: "notSupported", message: expect.stringMatching(/may still alter virtfn0/) }],
  ];
  for (const [fault, operation, error] of outcomes) {
    await softvf.fault(fault);
    // The other VF stops and starts while this one's command is under way.
    const outcome = operation().then(() => undefined, asError);
    await other.stop("drained");
    await other.start();
    await other.progress(20);
    const failure = await outcome;
    if (error === undefined) expect(failure).toBeUndefined();
    else expect(failure).toMatchObject(error);
  }
  await other.unload();
  expect(admin.queue.state).toEqual({ kind: "ready" });
}, 60_000);

test("a queue that answers nothing any more is dead; its VFs go on", async () => {
  await using softvf = await managed(2, [], { lifeSign: 200 });
  const { admin } = softvf;
  await using guest = await ManagedGuest.connect(softvf.vf(0), admin, 1, 7);
  await guest.start();
  guest.load(4);
  await guest.progress(50);
  await softvf.fault("status:silence,identity:silence");
  const results = await Promise.allSettled([1, 2].map((vdev) => admin.status(vdev, soon(100))));
  expect(results.map(({ status }) => status)).toEqual(["rejected", "rejected"]);
  await soon().poll(() => deathOf(admin), 1);
  expect(await rejection(admin.status(2, soon()))).toMatchObject({ code: "adminQueue" });
  await guest.progress(50);
  await guest.unload();
  // By its registers: drained, and continued where it stands.
  await guest.stop("drained");
  await guest.start();
  guest.load(4);
  await guest.progress(50);
  await guest.unload();
}, 30_000);

test("a queue is taken up with commands in flight, and without a reset", async () => {
  await using softvf = await managed(2, ["--admin-delay", "modify=100"]);
  const { admin, device } = softvf;
  const cut = Promise.allSettled([1, 2].map((vdev) => admin.modify(vdev, "quiesced", soon())));
  await Bun.sleep(20);
  const { data, fds } = admin.queue.snapshot();
  const copies = new Map([...fds].map(([name, number]) => [name, duplicate(number)]));
  admin.queue.abandon();
  expect((await cut).map(({ status }) => status)).toEqual(["rejected", "rejected"]);
  await using queue = AdminQueue.revive(device, JSON.parse(JSON.stringify(data)), copies);
  expect(queue.state).toEqual({ kind: "draining" });
  const revived = new VendorAdmin(queue);
  expect(await Promise.all([1, 2].map((vdev) => revived.status(vdev, soon())))).toEqual(["quiesced", "quiesced"]);
  expect(queue.state).toEqual({ kind: "ready" });
  expect(await device.status()).toBe(0x0f);
}, 20_000);

for (const freeze of ["drain", "list", "hold"]) {
  test(`a loaded VF stops and goes on, at any index: ${freeze}`, async () => {
    await using softvf = await managed(1, ["--freeze", freeze, "--slow", "2", "--out-of-order"]);
    await using guest = await ManagedGuest.connect(softvf.vf(0), softvf.admin, 1, 65_500);
    await guest.start();
    guest.load(6);
    for (let round = 0; round < 12; round++) {
      await guest.progress(20);
      const listed = freeze === "list" && round % 2 === 0;
      await guest.stop(listed ? "listed" : "drained");
      if (round % 3 === 0) await guest.reset();
      await guest.start();
    }
    await guest.unload();
  }, 30_000);
}

function duplicate(number: number): OwnedFd {
  const borrowed = new OwnedFd(number);
  const copy = borrowed.dup();
  borrowed.release();
  return copy;
}
