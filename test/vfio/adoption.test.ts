import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from "bun:test";
import { existsSync } from "node:fs";
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { silentLogger } from "../../src/base/log.ts";
import { KeeperClient } from "../../src/keeper/keeper-client.ts";
import { Mapping } from "../../src/native/mmio.ts";
import { eventfd, signalEventfd } from "../../src/native/sys.ts";
import { VfioAddressSpace, type VfioInterface } from "../../src/pci/vfio/address-space.ts";
import { keeperSocket } from "../../src/runtime-directory.ts";
import { DataPath } from "../../src/virtio/data-path.ts";
import { encodeDeviceState } from "../../src/virtio/device-state-codec.ts";
import { FeatureBit, featureBits } from "../../src/virtio/features.ts";
import { atLength } from "../kit/at-length.ts";
import { DriverQueue } from "../kit/driver-queue.ts";
import { DriverRing } from "../kit/driver-ring.ts";
import { fakeClass } from "../kit/fake-class.ts";
import { Child } from "../kit/guest/child.ts";
import { GuestMemoryFile } from "../kit/guest-memory-file.ts";
import { lockedMemory } from "../kit/machine/bare-function.ts";
import { isBusMaster } from "../kit/machine/iommu-view.ts";
import type { KernelLog } from "../kit/machine/kernel-log.ts";
import { PROGRAM_ENVIRONMENT, programLine } from "../kit/machine/programs.ts";
import { rangeOf, refusal, SpaceLab, soon } from "../kit/machine/space-lab.ts";
import { VerifiedDisk } from "../kit/verified-disk.ts";

/**
 * A process that drives a function of kernel VFIO is killed in mid-I/O; another one, which gets its records and file
 * descriptors from the keeper, goes on with it. This process is the guest, and the successor.
 */

const TIMEOUT = 120_000;
const START_TIMEOUT = 60_000;
const FILES = 1 << 16;
const MiB = 2 ** 20;
const GiB = 2 ** 30;
const INTERFACES: readonly VfioInterface[] = existsSync("/dev/iommu")
  ? atLength(["group", "iommufd"], ["iommufd"])
  : ["group"];
const FEATURES = featureBits(FeatureBit.version1, FeatureBit.accessPlatform);
const RING = 64;
/** Requests under way. */
const DEPTH = 4;
/** Across a border of two of the pieces in which memory is mapped. */
const BASE = GiB - MiB;
const SIZE = 4 * MiB;
const LOW = { start: BASE, end: BASE + SIZE };
const MORE = { start: 4 * GiB, end: 4 * GiB + MiB };
const SOME = 16;

let lab: SpaceLab;
let log: KernelLog;
let undo: AsyncDisposableStack;
let socket = "";

beforeAll(async () => {
  lab = await SpaceLab.create();
}, TIMEOUT);
afterAll(async () => {
  await lab?.[Symbol.asyncDispose]();
}, TIMEOUT);
beforeEach(async () => {
  undo = new AsyncDisposableStack();
  log = undo.use(lab.machine.kernelLog());
  const directory = await mkdtemp(join(tmpdir(), "adoption-"));
  undo.defer(() => rm(directory, { recursive: true, force: true }));
  // The machine's own limit is one for small programs.
  const line = ["prlimit", `--nofile=${FILES}:${FILES}`, ...programLine("vfe-vhostd-ha"), "--runtime-dir", directory];
  const options = { name: "keeper", log: join(directory, "keeper.log"), environment: PROGRAM_ENVIRONMENT };
  const keeper = undo.use(new Child(line, options));
  await keeper.line(/^ready /m, START_TIMEOUT);
  socket = keeperSocket(directory);
}, TIMEOUT);
afterEach(async () => {
  await undo.disposeAsync();
  await lab.reset();
}, TIMEOUT);

/** A guest with one queue, whose memory, kick and call outlive everybody. */
async function makeGuest() {
  const memory = undo.use(new GuestMemoryFile(BASE, SIZE));
  const kick = undo.use(eventfd());
  const features = FEATURES;
  const ring = new DriverRing({ memory, base: BASE, size: RING, features, bufferSpace: 3 * MiB });
  const ways = { ring: () => signalEventfd(kick.number) };
  const queue = undo.use(new DriverQueue(ring, () => ways.ring()));
  const range = rangeOf(memory.file, BASE, SIZE);
  const { desc, driver, device } = ring;
  const queues = [{ index: 0, size: RING, vector: 0, desc, driver, device, lastAvail: 0, lastUsed: 0 }];
  const state = JSON.stringify(
    encodeDeviceState({ features, status: 0, configVector: 0, config: new Uint8Array(0), queues }),
  );
  using client = await KeeperClient.connect(socket, soon("the keeper"));
  const fds = new Map(Object.entries({ memory: memory.file, kick, call: queue.call }).map(([k, v]) => [k, v.number]));
  await client.put("guest", () => ({ record: { range: { ...range, file: { ...range.file } }, state }, fds }));
  return { memory, queue, range, ways };
}

/** What a process has put, the fds this one's. */
async function take(client: KeeperClient, key: string) {
  const { record, fds } = (await client.get(key))!;
  return { data: record, fds };
}

/** The page with the doorbell, mapped by the guest. */
function ringOf({ data, fds }: Awaited<ReturnType<typeof take>>): () => void {
  const { offset, size } = data as { offset: number; size: number };
  using device = fds.get("device")!;
  const doorbell = undo.use(Mapping.map(device.number, offset, size, "read-write"));
  return () => doorbell.write16(0, 0);
}

async function startFirst(kind: VfioInterface, way: "kick" | "doorbell"): Promise<Child> {
  const command = [...programLine("adoption-program"), socket, kind, lab.address("blk0"), way];
  const options = { name: "first process", log: `${socket}.first`, environment: PROGRAM_ENVIRONMENT };
  const first = undo.use(new Child(command, options));
  await first.line(/^running$/m, START_TIMEOUT);
  return first;
}

describe.each(INTERFACES)("over %s", (kind) => {
  test.each(["kick", "doorbell"] as const)(
    "what was killed in mid-I/O is gone on with, rung by the %s",
    async (way) => {
      const { memory, queue, range, ways } = await makeGuest();
      const first = await startFirst(kind, way);
      const keeper = undo.use(await KeeperClient.connect(socket, soon("the keeper")));
      if (way === "doorbell") ways.ring = ringOf(await take(keeper, "page"));
      const io = new VerifiedDisk().runOn(queue, DEPTH);
      await io.progress(SOME);
      await first.kill();
      // Nobody is needed for this.
      if (way === "doorbell") await io.progress(SOME);
      expect(await lab.reachable("blk0")).toEqual([LOW]);
      expect(await isBusMaster(lab.address("blk0"))).toBe(true);

      // The successor.
      const settings = { interface: kind, token: async () => "", log: silentLogger };
      const space = VfioAddressSpace.revive("a VM", await take(keeper, "space"), settings);
      undo.defer(() => space[Symbol.dispose]());
      const { data, fds } = await take(keeper, "function");
      const fn = space.revive(await lab.entry("blk0"), data, fds);
      undo.use(fn);
      space.adopt(fn);
      const stored = await take(keeper, "path");
      const path = DataPath.revive(fn, stored.data, stored.fds, (virtioId) => fakeClass({ virtioId }));
      undo.defer(() => path.abandon());
      const mapped = [{ ...range, fd: memory.file.number }];
      if (kind === "group") {
        // Only this interface is asked for each mapping, and what is there is taken up all the same.
        const never = rangeOf(memory.file, MORE.start, MiB);
        const refused = await refusal(
          space.takeUp([{ ...never, fd: memory.file.number }, ...mapped], soon("taking up")),
        );
        expect(refused).toMatchObject({ code: "iommuDomain" });
        await space.unmapIfThere(never, soon("unmapping"));
      }
      await space.takeUp(mapped, soon("taking up"));
      space.adoptedAll();
      expect(space.interface).toBe(kind === "group" ? "group" : "iommufd");
      expect(lockedMemory(process.pid)).toBe(kind === "group" ? SIZE : 0);
      expect(await lab.reachable("blk0")).toEqual([LOW]);
      await io.progress(SOME);

      // An earlier process may have died while it mapped this.
      const more = lab.file(MiB);
      const extra = rangeOf(more, MORE.start, MiB);
      await space.unmapIfThere(extra, soon("unmapping"));
      await space.map(extra, more.number, soon("mapping"));
      expect(await lab.reachable("blk0")).toEqual([LOW, MORE]);
      // Another function of the VM, which all is mapped for.
      const second = await space.open(await lab.entry("blk1"), soon("opening"));
      undo.use(second);
      await space.attach(second, [...mapped, { ...extra, fd: more.number }], soon("attaching"));
      expect(await lab.reachable("blk1")).toEqual([LOW, MORE]);
      await space.unmap(extra, soon("unmapping"));
      expect(await lab.reachable("blk0")).toEqual([LOW]);
      await space.detach(second, mapped, soon("detaching"));
      await second[Symbol.asyncDispose]();
      await io.progress(SOME);

      // Another call in mid-I/O: no interrupt is lost between the two.
      queue.rewire(() => ways.ring());
      await path.setCall(0, queue.call.number);
      if (way === "kick") {
        const another = undo.use(eventfd());
        ways.ring = () => signalEventfd(another.number);
        await path.setKick(0, another.number);
      }
      await io.progress(SOME);
      await io.stop();
      const stopped = await path.stop(memory, "drained", soon("stopping"));
      expect(queue.returned).toBe(queue.submitted);
      expect(stopped.queues).toMatchObject([{ lastAvail: queue.submitted, lastUsed: queue.returned }]);
      await path.reset(soon("resetting"));
      // Nothing is attached any more, and then something is again.
      await space.detach(fn, mapped, soon("detaching"));
      await space.attach(fn, mapped, soon("attaching"));
      expect(await lab.reachable("blk0")).toEqual([LOW]);
      await space.unmap(range, soon("unmapping"));
      expect(await lab.reachable("blk0")).toEqual([]);
      expect(lockedMemory(process.pid)).toBe(0);
      for (const key of await keeper.list()) await keeper.delete(key);
      expect(log.dmaFaults()).toEqual([]);
    },
    TIMEOUT,
  );
});
