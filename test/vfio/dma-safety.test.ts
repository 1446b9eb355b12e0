import { afterAll, afterEach, beforeAll, expect, test } from "bun:test";
import { Deadline } from "../../src/base/deadline.ts";
import { silentLogger } from "../../src/base/log.ts";
import { duplicate } from "../../src/native/fd.ts";
import { fileInfo, memfd, pread } from "../../src/native/sys.ts";
import { parsePciAddress } from "../../src/pci/address.ts";
import { Bus } from "../../src/pci/bus.ts";
import { DmaDomain } from "../../src/pci/dma-domain.ts";
import { addressSpaces } from "../../src/pci/open.ts";
import type { Extent } from "../../src/pci/ranges.ts";
import { BUILT_IN_PLUGINS, PluginRegistry } from "../../src/plugin-host.ts";
import { DataPath } from "../../src/virtio/data-path.ts";
import { DescriptorFlag } from "../../src/virtio/split-ring.ts";
import { BlkStatus, BlkType, header } from "../kit/blk-requests.ts";
import type { VhostUserFrontend } from "../kit/frontend/frontend.ts";
import { IommuView, isBusMaster } from "../kit/machine/iommu-view.ts";
import type { DmaFault } from "../kit/machine/kernel-log.ts";
import { MACHINE_TEST_TIMEOUT, MachineLab } from "../kit/machine/lab.ts";
import { ReachWatch } from "../kit/machine/reach-watch.ts";
import { VirtioWindow } from "../kit/machine/virtio-window.ts";
import { VerifiedDisk } from "../kit/verified-disk.ts";

const LOW = { gpa: 0x10_0000, size: 1 << 20 };
const HIGH = { gpa: 2 ** 32, size: 2 << 20 };
const MORE = { gpa: 2 ** 33, size: 1 << 20 };
const MEMORY = [LOW, HIGH].map(extent);
/** Half of HIGH is left for buffers that a test places itself. */
const RING = { size: 64, bufferSpace: 512 << 10 };
const SCRATCH = HIGH.gpa + (1 << 20);
const STATUS = SCRATCH + 16;
/** Bytes of a request. QEMU's devices take a page that the IOMMU refuses as one to be thrown away, and object to more. */
const TRANSFER = 8192;
const VM = "6a9c0a4e-51f2-4c5e-8d39-0f1f3c2b7a11";
/** Milliseconds in which a device that was told to would long have written. */
const LONG_ENOUGH = 300;

let lab: MachineLab;
let view: IommuView;
let a = "";
let b = "";

beforeAll(async () => {
  lab = await MachineLab.create();
  [a, b] = lab.bind("blk0", "blk1");
  view = await IommuView.of(lab.machine);
}, MACHINE_TEST_TIMEOUT);
afterEach(async () => {
  await lab.removeAll();
}, MACHINE_TEST_TIMEOUT);
afterAll(async () => {
  await lab?.[Symbol.asyncDispose]();
}, MACHINE_TEST_TIMEOUT);

test(
  "a function reaches what its guest has given, at each step of its life",
  async () => {
    const watch = new ReachWatch(view, [a]);
    await watch.step("bound to vfio-pci", {}, () => {});
    await watch.step("vf -a", {}, () => lab.add(a));
    expect(await isBusMaster(a)).toBe(false);
    using guest = lab.dial(a);
    await watch.step("negotiation", {}, () => guest.negotiate());
    await watch.step("SET_MEM_TABLE", { [a]: MEMORY }, () => giveMemory(guest));
    await expectOwnMemory(a, guest);
    expect(await isBusMaster(a)).toBe(false);
    await watch.step("start", {}, () => guest.startQueues(1, RING));
    const disk = new VerifiedDisk();
    await disk.steps(guest.queues[0]!.driver, 20);
    const more = guest.memory.add(MORE.gpa, MORE.size);
    await watch.step("ADD_MEM_REG", { [a]: [...MEMORY, extent(MORE)] }, () => guest.addRegion(more));
    await expectOwnMemory(a, guest);
    await disk.steps(guest.queues[0]!.driver, 20);
    await watch.step("REM_MEM_REG", { [a]: MEMORY }, () => guest.removeRegion(more));
    guest.memory.drop(more);
    await disk.steps(guest.queues[0]!.driver, 20);
    const bases = await watch.step("GET_VRING_BASE", {}, async () => [await guest.getBase(0)]);
    await watch.step("start at the base it stopped at", {}, () => guest.resumeQueues(bases));
    await disk.steps(guest.queues[0]!.driver, 20);
    await watch.step("stop", {}, () => guest.stop({ order: "new" }));
    const [low] = guest.memory.regions;
    await watch.step("REM_MEM_REG of a device at rest", { [a]: [extent(HIGH)] }, () => guest.removeRegion(low!));
    await watch.step("hang-up", { [a]: [] }, async () => {
      guest[Symbol.dispose]();
      await lab.reaches(a, "idle");
    });
    await watch.step("vf -r", {}, () => lab.remove(a));
    expect(await isBusMaster(a)).toBe(false);
  },
  MACHINE_TEST_TIMEOUT,
);

test(
  "nothing is reachable after a crash of the front-end, of the daemon, after vf -r and the end of the daemon",
  async () => {
    const watch = new ReachWatch(view, [a]);
    const crashes: Record<string, (guest: VhostUserFrontend) => Promise<void>> = {
      "kill -9 of the front-end": async (guest) => {
        guest[Symbol.dispose]();
        await lab.reaches(a, "idle");
      },
      "vf -r": () => lab.remove(a),
      "kill -9 of the daemon": () => lab.killDaemon(),
      "SIGTERM to the daemon": () => lab.stopDaemon(),
    };
    for (const [what, crash] of Object.entries(crashes)) {
      // A front-end that has a doorbell keeps function and memory as long as it lives.
      await lab.add(a, { hostNotifier: false });
      using guest = await watch.step(`start before ${what}`, { [a]: MEMORY }, () => boot(a));
      using memory = duplicate(guest.memory.regions[1]!.file.file.number);
      const { ring } = guest.queues[0]!.driver;
      const io = new VerifiedDisk().runOn(guest.queues[0]!.driver, 8);
      await io.progress(20);
      await watch.step(what, { [a]: [] }, () => crash(guest));
      guest[Symbol.dispose]();
      await io.abandon();
      // What stands in the ring still is not looked at any more, whoever rings.
      const before = contents(memory.number);
      const address = ring.desc - HIGH.gpa;
      expect(before.subarray(address, address + 16).some((byte) => byte !== 0)).toBe(true);
      new VirtioWindow(a).ring(0);
      await Bun.sleep(LONG_ENOUGH);
      expect(contents(memory.number)).toEqual(before);
      if (what === "kill -9 of the front-end") await lab.remove(a);
      if (what.endsWith("the daemon")) await lab.startDaemon();
      expect(await isBusMaster(a)).toBe(false);
    }
  },
  MACHINE_TEST_TIMEOUT,
);

test(
  "VFs of one VM reach the memory of both sessions, those of two VMs each their own",
  async () => {
    const watch = new ReachWatch(view, [a, b]);
    await watch.step("vf -a of both, one VM", {}, async () => {
      await lab.add(a, { vm: VM });
      await lab.add(b, { vm: VM });
    });
    using first = lab.dial(a);
    using second = lab.dial(b);
    await first.negotiate();
    await second.negotiate();
    await watch.step("memory by the first", { [a]: MEMORY, [b]: MEMORY }, () => giveMemory(first));
    const all = [...MEMORY, extent(MORE)];
    await watch.step("more by the second", { [a]: all, [b]: all }, () => giveMemory(second, [MORE]));
    await watch.step("hang-up of the second", { [a]: MEMORY, [b]: MEMORY }, async () => {
      second[Symbol.dispose]();
      await lab.reaches(b, "idle");
    });
    await watch.step("vf -r of the second", { [b]: [] }, () => lab.remove(b));
    await watch.step("vf -a of the second for another VM", {}, () => lab.add(b));
    using other = lab.dial(b);
    await other.negotiate();
    await watch.step("memory of the other VM at the same addresses", { [b]: MEMORY }, () => giveMemory(other));
    await expectOwnMemory(a, first);
    await expectOwnMemory(b, other);
    await watch.step("vf -r of the first", { [a]: [] }, () => lab.remove(a));
    await expectOwnMemory(b, other);
    await watch.step("vf -r of the other", { [b]: [] }, () => lab.remove(b));
    first[Symbol.dispose]();
    other[Symbol.dispose]();
  },
  MACHINE_TEST_TIMEOUT,
);

test(
  "a driver that names memory beyond its regions gets a fault, and nobody's memory changes",
  async () => {
    await lab.add(a);
    await lab.add(b);
    // Another VM, with memory where the first one has none, all around its regions.
    using neighbour = lab.dial(b);
    await neighbour.negotiate();
    const around = [
      { gpa: LOW.gpa - 0x1_0000, size: 0x1_0000 },
      { gpa: LOW.gpa + LOW.size, size: 0x1_0000 },
      { gpa: HIGH.gpa - 0x1_0000, size: 0x1_0000 },
      { gpa: HIGH.gpa + HIGH.size, size: 0x1_0000 },
    ];
    await giveMemory(neighbour, around);
    const before = neighbour.memory.regions.map(({ file }) => contents(file.file.number));
    const places = [
      { address: LOW.gpa - TRANSFER, fault: LOW.gpa - TRANSFER },
      { address: LOW.gpa + LOW.size - 512, fault: LOW.gpa + LOW.size },
      { address: HIGH.gpa - TRANSFER, fault: HIGH.gpa - TRANSFER },
      { address: HIGH.gpa + HIGH.size, fault: HIGH.gpa + HIGH.size },
    ];
    for (const { address, fault } of places) {
      using guest = await boot(a);
      expect((await lab.info(a)).reason).toBeNull();
      const own = guest.memory.regions.map(({ file }) => contents(file.file.number));
      await expectFault(a, fault, () => readInto(guest, address));
      for (const [index, { file }] of guest.memory.regions.entries()) {
        // The rings and requests are in the second one, before SCRATCH.
        const from = index === 0 ? 0 : SCRATCH - HIGH.gpa;
        expect(contents(file.file.number).subarray(from)).toEqual(own[index]!.subarray(from));
      }
      guest[Symbol.dispose]();
      await lab.reaches(a, "idle");
    }
    // Memory that was given and taken again.
    using guest = await boot(a);
    const more = guest.memory.add(MORE.gpa, MORE.size);
    await guest.addRegion(more);
    await readRequestInto(guest, MORE.gpa);
    expect(guest.memory.read(STATUS, 1)[0]).toBe(BlkStatus.ok);
    await guest.removeRegion(more);
    const taken = contents(more.file.file.number);
    await expectFault(a, MORE.gpa, () => readInto(guest, MORE.gpa));
    expect(contents(more.file.file.number)).toEqual(taken);
    guest[Symbol.dispose]();
    expect(neighbour.memory.regions.map(({ file }) => contents(file.file.number))).toEqual(before);
    expect((await lab.info(b)).reason).toBeNull();
    await lab.remove(a);
    await lab.remove(b);
  },
  MACHINE_TEST_TIMEOUT,
);

test(
  "a function in reach of its VM's memory does not master the bus before its driver runs it, nor afterwards",
  async () => {
    const bus = new Bus(["/sys/bus/pci/devices"]);
    const plugins = await PluginRegistry.load({ builtIn: BUILT_IN_PLUGINS, plugins: [] }, silentLogger);
    const domain = new DmaDomain(addressSpaces()("vfio", "a VM"));
    using memory = memfd("guest", LOW.size);
    const { dev, ino } = fileInfo(memory.number);
    const range = { iova: LOW.gpa, size: LOW.size, file: { dev, ino }, offset: 0 };
    const deadline = Deadline.after(MACHINE_TEST_TIMEOUT, "a step of the test");
    const open = async (address: string) => {
      const entry = await bus.find(parsePciAddress(address));
      return await domain.open(entry!, deadline);
    };
    {
      await using steps = new AsyncDisposableStack();
      steps.defer(() => domain.abandon());
      await domain.attach(steps.use(await open(b)));
      await domain.claim("a VM", range, memory.number);
      const fn = steps.use(await open(a));
      expect(await isBusMaster(a)).toBe(false);
      const path = await DataPath.open(fn, (id) => plugins.deviceClassById(id)!, deadline);
      steps.defer(() => path.abandon());
      expect(await isBusMaster(a)).toBe(false);
      await domain.attach(fn);
      expect(await isBusMaster(a)).toBe(false);
      expect(await view.reach(a)).toEqual({ kind: "ranges", ranges: [extent(LOW)] });
      await domain.detach(fn);
      expect(await isBusMaster(a)).toBe(false);
    }
    expect(await view.reach(a)).toEqual({ kind: "nothing" });
    expect(await view.reach(b)).toEqual({ kind: "nothing" });
  },
  MACHINE_TEST_TIMEOUT,
);

/** The memory that a VF's own control queue has is the daemon's. */
test(
  "a function's own control queue lies at the top, where no guest can have memory",
  async () => {
    const [net] = lab.bind("net0");
    const end = 2 ** lab.machine.description.addressBits;
    await lab.add(net);
    const reach = await view.reach(net);
    if (reach.kind !== "ranges") throw new Error(`${net} reaches ${reach.kind}`);
    const [own, ...others] = reach.ranges;
    expect(others).toEqual([]);
    expect(own!.end).toBe(end);
    const watch = new ReachWatch(view, [net]);
    await watch.step("vf -a", { [net]: [own!] }, () => {});
    using guest = lab.dialNet(net);
    await guest.negotiate();
    await watch.step("SET_MEM_TABLE", { [net]: [own!, ...MEMORY] }, () => giveMemory(guest));
    const over = guest.memory.add(own!.start, 4096);
    const answer = await watch.step("ADD_MEM_REG over it", {}, () => guest.addRegion(over));
    expect(answer).not.toBe(0n);
    await watch.step("hang-up", { [net]: [own!] }, async () => {
      guest[Symbol.dispose]();
      await lab.reaches(net, "idle");
    });
    await watch.step("vf -r", { [net]: [] }, () => lab.remove(net));
  },
  MACHINE_TEST_TIMEOUT,
);

function extent({ gpa, size }: { readonly gpa: number; readonly size: number }): Extent {
  return { start: gpa, end: gpa + size };
}

/** A guest whose driver runs one queue. */
async function boot(address: string): Promise<VhostUserFrontend> {
  const guest = lab.dial(address);
  await guest.negotiate();
  await giveMemory(guest);
  await guest.startQueues(1, RING);
  return guest;
}

/** SET_MEM_TABLE of regions whose pages can be told apart from all others. */
async function giveMemory(guest: VhostUserFrontend, regions = [LOW, HIGH]): Promise<void> {
  for (const { gpa, size } of regions) {
    guest.memory.add(gpa, size);
    guest.memory.write(gpa, crypto.getRandomValues(new Uint8Array(4096)));
    guest.memory.write(gpa + size - 4096, crypto.getRandomValues(new Uint8Array(4096)));
  }
  expect(await guest.setMemTable()).toBe(0n);
}

/** The first and the last page of each region are, for the function, those of the guest's own files. */
async function expectOwnMemory(address: string, { memory }: VhostUserFrontend): Promise<void> {
  for (const { file } of memory.regions) {
    for (const gpa of [file.gpa, file.gpa + file.size - 4096]) {
      expect(await view.read(address, gpa, 16)).toEqual(file.read(gpa, 16));
    }
  }
}

/** Has the disk write to memory at `address`, whoever has it. */
function readInto(guest: VhostUserFrontend, address: number): void {
  readRequestInto(guest, address).catch(() => {});
}

function readRequestInto(guest: VhostUserFrontend, address: number) {
  guest.memory.write(SCRATCH, header(BlkType.in, 0));
  return guest.queues[0]!.driver.requestRaw([
    { address: SCRATCH, length: 16, flags: 0 },
    { address, length: TRANSFER, flags: DescriptorFlag.write },
    { address: STATUS, length: 1, flags: DescriptorFlag.write },
  ]);
}

/** The IOMMU refuses what lies there, and nothing else; the VF is shown to need a reset. */
async function expectFault(address: string, iova: number, provoke: () => void): Promise<void> {
  await lab.roomForFault();
  provoke();
  const faults: DmaFault[] = [];
  await Deadline.after(10_000, `DMA fault of ${address}`).poll(async () => {
    const { reason } = await lab.info(address);
    faults.push(...lab.takeFaults());
    return (faults.length > 0 && reason?.includes("asks for a reset")) || undefined;
  }, 100);
  for (const fault of faults) {
    expect(fault.address).toBe(address);
    expect(Number(fault.iova)).toBeGreaterThanOrEqual(iova);
    expect(Number(fault.iova)).toBeLessThan(iova + TRANSFER);
  }
}

function contents(fd: number): Uint8Array {
  const bytes = new Uint8Array(fileInfo(fd).size);
  pread(fd, bytes, 0);
  return bytes;
}
