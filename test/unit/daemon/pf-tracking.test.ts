import { afterEach, expect, test } from "bun:test";
import { Deadline } from "../../../src/base/deadline.ts";
import { silentLogger } from "../../../src/base/log.ts";
import { DEADLINES } from "../../../src/daemon/deadlines.ts";
import { Pf, type PfSurroundings } from "../../../src/daemon/pf.ts";
import { parsePfRecord } from "../../../src/daemon/record.ts";
import { liveFds } from "../../../src/native/fd.ts";
import { parsePciAddress } from "../../../src/pci/address.ts";
import type { AddressSpace } from "../../../src/pci/address-space.ts";
import type { BusEntry } from "../../../src/pci/bus.ts";
import { PluginRegistry } from "../../../src/plugin-host.ts";
import { TRACKING_FEATURE } from "../../../src/virtio/admin/vendor.ts";
import { FeatureBit, featureBits } from "../../../src/virtio/features.ts";
import type { MoverSnapshot } from "../../../src/virtio/mover.ts";
import { FakeAdmin } from "../../kit/fake-admin.ts";
import { fakeClass } from "../../kit/fake-class.ts";
import { FakeFunction } from "../../kit/fake-function.ts";
import { MemoryKeeper } from "../../kit/memory-keeper.ts";
import { moverHost } from "../virtio/mover-host.ts";
import { FrontEndLog } from "../virtio/tracking-lab.ts";
import { disposeAll } from "../virtio/vendor-lab.ts";

const PF = parsePciAddress("0000:5a:00.0");
const VFS = [parsePciAddress("0000:5a:00.1"), parsePciAddress("0000:5a:00.2")] as const;
const ENTRY: BusEntry = {
  address: PF,
  directory: "/sys/bus/pci/devices/0000:5a:00.0",
  ...{ vendor: 0x1af4, device: 0x1042, class: 0x018000, physfn: undefined },
  virtfns: new Map(VFS.entries()),
  transport: { kind: "vfio-user", socket: "vfio-user.sock" },
};

const soon = () => Deadline.after(2000, "the test");
const undo: (() => unknown)[] = [];
afterEach(async () => {
  for (const one of undo.splice(0).reverse()) await one();
  await disposeAll();
  expect(liveFds()).toBe(0);
});

/** A PF made of registers, and what the daemon has around it. */
function make() {
  const { pushBitmap, pullBytemap } = TRACKING_FEATURE;
  const features = featureBits(FeatureBit.accessPlatform, FeatureBit.adminVq, pushBitmap, pullBytemap);
  const fake = new FakeAdmin({ features });
  const keeper = new MemoryKeeper();
  const plugins = new PluginRegistry();
  const setup = (host: { deviceClass(one: ReturnType<typeof fakeClass>): void }) =>
    host.deviceClass(fakeClass({ adminQueue: () => 0 }));
  plugins.register({ name: "fake", apiVersion: 1, setup }, "the test");
  const { dma } = fake;
  const space: AddressSpace = {
    ...{ ioRanges: dma.ioRanges, pageSize: dma.pageSize },
    open: async () => fake.fn,
    revive: () => fake.fn,
    attach: () => dma.attach(),
    detach: () => dma.detach(),
    map: (range, fd) => dma.map(range, fd),
    unmap: (range) => dma.unmap(range),
    unmapIfThere: (range) => dma.unmapIfThere(range),
    adopt: () => {},
    // Its mappings are the other side's, too.
    [Symbol.dispose]: () => {},
  };
  const around: PfSurroundings = {
    plugins,
    spaces: () => space,
    log: silentLogger,
    deadlines: DEADLINES,
    onTrouble: () => {},
    onGone: async () => {},
    onMapped: (pf) => keeper.put("pf", () => pf.snapshot()),
  };
  undo.push(
    () => fake[Symbol.asyncDispose](),
    () => keeper[Symbol.dispose](),
  );
  return { fake, keeper, around };
}

async function moverOf(pf: Pf, snapshot: MoverSnapshot = { kind: "reset" }) {
  const fn = new FakeFunction({ queues: 2 });
  const mover = pf.moverFor(VFS[0], ENTRY).make!(await moverHost(fn), snapshot);
  undo.push(() => mover.abandon?.());
  return mover;
}

test("a PF says how it can mark pages, and its VFs can", async () => {
  const { fake, around, keeper } = make();
  const pf = await Pf.attach(PF, ENTRY, around);
  undo.push(() => pf[Symbol.asyncDispose]());
  expect(pf.management).toMatchObject({ managed: true, tracking: ["push-bitmap", "pull-bytemap"] });
  const mover = await moverOf(pf);
  await mover.prove!(soon());
  const log = new FrontEndLog(64);
  await mover.track!(log.tracking(), soon());
  fake.write(1, 5);
  expect(log.take()).toEqual([5]);
  const mapped = async () => JSON.stringify((await kept(keeper)).record).match(/dirty pages/g)?.length ?? 0;
  expect(await mapped()).toBe(1);
  await mover.track!(undefined, soon());
  expect(await mapped()).toBe(0);
});

test("after a restart it ends what the earlier process had begun, lets go of its memory, and can begin anew", async () => {
  const { fake, around, keeper } = make();
  const first = await Pf.attach(PF, ENTRY, around);
  const before = await moverOf(first);
  await before.prove!(soon());
  const [old, log] = [new FrontEndLog(64), new FrontEndLog(128)];
  await before.track!(old.tracking(), soon());
  const snapshot = before.snapshot();
  before.abandon?.();
  first.abandon();
  const { record, fds } = (await keeper.get("pf"))!;
  const pf = Pf.revive(ENTRY, parsePfRecord(record), fds, around);
  undo.push(() => pf[Symbol.asyncDispose]());
  await pf.takeUp(soon());
  expect(pf.management.tracking).toEqual(["push-bitmap", "pull-bytemap"]);
  const mover = await moverOf(pf, snapshot);
  expect(mover.capabilities.dirtyTracking).toBe(true);
  await mover.track!(log.tracking(), soon());
  expect(fake.maps).toBe(1);
  expect(log.take().length).toBe(128);
  fake.write(1, 100);
  expect(log.take()).toEqual([100]);
  expect(old.take()).toEqual([]);
  // Also those whose pages nobody marked were asked to stop.
  expect(fake.commands("stopTracking", 2).length).toBe(1);
});

async function kept(keeper: MemoryKeeper) {
  const { record, fds } = (await keeper.get("pf"))!;
  for (const fd of fds.values()) fd[Symbol.dispose]();
  return { record };
}
