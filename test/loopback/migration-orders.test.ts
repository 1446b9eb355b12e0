import { describe, expect, test } from "bun:test";
import { liveFds } from "../../src/native/fd.ts";
import { Request } from "../../src/vhost-user/messages.ts";
import { TRACKING_LABEL, TRACKING_MODES } from "../../src/virtio/admin/vendor.ts";
import { LOG_PAGE } from "../../src/virtio/dirty-log.ts";
import { FeatureBit, featureBits, Status } from "../../src/virtio/features.ts";
import { DescriptorFlag } from "../../src/virtio/split-ring.ts";
import { BlkType, header, SECTOR, writeRequest } from "../kit/blk-requests.ts";
import type { DriverQueue } from "../kit/driver-queue.ts";
import { FrontendDirtyLog } from "../kit/frontend/dirty-log.ts";
import type { VhostUserFrontend } from "../kit/frontend/frontend.ts";
import type { FrontendMemory } from "../kit/frontend/memory.ts";
import { Migration } from "../kit/frontend/migration.ts";
import { setLogBase, startLogging, stopLogging } from "../kit/frontend/migration-messages.ts";
import { RegistryLab } from "../kit/registry-lab.ts";
import { BackgroundIo, VerifiedDisk } from "../kit/verified-disk.ts";

/** What else a VMM says while its VM migrates, in any order: memory at the destination is right whenever the VM stands. */

const LOG_ALL = featureBits(FeatureBit.vhostLogAll);
const RUNNING = Status.acknowledge | Status.driver | Status.featuresOk | Status.driverOk;
/** Room for memory that is added. */
const END = 2 ** 32 + (64 << 20);
const ADDED = { gpa: 2 ** 32 + (40 << 20), size: 1 << 20 };

/** What the disk has, from its first sector on. */
const CONTENT = crypto.getRandomValues(new Uint8Array(256 << 10));
/** Where data is read to: each lane has a part of its own, its header in the first page and its status in the last. */
const LANES = { gpa: 2 ** 32 + (20 << 20), pages: 64, count: 4 };
const READ = 8192;

/** Reads from somewhere to somewhere: the driver writes none of the pages that the device does. */
async function readOnce(queue: DriverQueue, memory: FrontendMemory, lane: number): Promise<void> {
  const page = (index: number) => LANES.gpa + (lane * LANES.pages + index) * LOG_PAGE;
  const sector = random((CONTENT.length - READ) / SECTOR);
  const to = page(1 + random(LANES.pages - 5)) + random(LOG_PAGE);
  const [head, status] = [page(0), page(LANES.pages - 1)];
  memory.write(head, header(BlkType.in, sector));
  await queue.requestRaw([
    { address: head, length: 16, flags: 0 },
    { address: to, length: READ, flags: DescriptorFlag.write },
    { address: status, length: 1, flags: DescriptorFlag.write },
  ]);
  expect(memory.read(status, 1)[0]).toBe(0);
  const right = CONTENT.subarray(sector * SECTOR, sector * SECTOR + READ);
  if (Buffer.compare(memory.read(to, READ), right) !== 0) throw new Error(`sector ${sector} came back different`);
}

function random(below: number): number {
  return Math.floor(Math.random() * below);
}

/** A VM in migration, whose memory is copied as its dirty logs say. */
class MigratingVm implements Disposable {
  /** Those that were given up too: a VMM looks into them a last time. */
  private readonly logs = [new FrontendDirtyLog(END)];
  private readonly written = new Set<number>();
  private readonly copies = new Map<number, Uint8Array>();
  private readonly io: BackgroundIo[];

  constructor(private readonly devices: readonly VhostUserFrontend[]) {
    for (const { memory } of devices) {
      memory.onWrite = (gpa, length) => {
        for (let page = Math.floor(gpa / LOG_PAGE); page * LOG_PAGE < gpa + length; page++) this.written.add(page);
      };
    }
    const queues = devices.flatMap(({ queues, memory }) => queues.map(({ driver }) => ({ driver, memory })));
    const lanes = queues.flatMap((queue) => Array.from({ length: LANES.count }, () => queue));
    this.io = lanes.map(({ driver, memory }, lane) => new BackgroundIo(() => readOnce(driver, memory, lane)));
  }

  async begin(): Promise<void> {
    for (const device of this.devices) {
      await startLogging(device, this.log);
      device.features |= LOG_ALL;
    }
    for (const { file } of this.memory.regions) {
      for (let gpa = file.gpa; gpa < file.gpa + file.size; gpa += LOG_PAGE) this.copy(gpa / LOG_PAGE);
    }
  }

  async cancel(): Promise<void> {
    for (const device of this.devices) {
      device.features &= ~LOG_ALL;
      await stopLogging(device);
    }
    this.renewLog();
  }

  async otherLog(): Promise<void> {
    this.renewLog();
    for (const device of this.devices) await setLogBase(device, this.log);
    this.pass();
  }

  pass(): void {
    for (const log of this.logs) for (const page of log.take()) this.copy(page);
    for (const page of this.written) this.copy(page);
    this.written.clear();
  }

  /** The VM is stopped, looked at, and goes on: `renew` as QEMU does it, with another log that comes after the kicks. */
  async pause(order: "old" | "new", renew: boolean): Promise<void> {
    const bases: number[][] = [];
    for (const device of this.devices) bases.push(await device.stop({ order }));
    this.pass();
    expect(this.differences()).toEqual([]);
    if (renew) this.renewLog();
    for (const [index, device] of this.devices.entries()) await this.goOn(device, bases[index]!);
  }

  /** One of the devices alone is stopped and goes on, while the others work. */
  async pauseOne(): Promise<void> {
    const device = this.devices[0]!;
    const bases = await device.stop({ order: "new" });
    this.pass();
    await this.goOn(device, bases);
  }

  async toggle(): Promise<void> {
    for (const device of this.devices) {
      await device.enable(1, false);
      await Bun.sleep(5);
      await device.enable(1, true);
    }
  }

  async changeMemory(): Promise<void> {
    const first = this.memory.add(ADDED.gpa, ADDED.size);
    const added = this.devices.map((device, index) => {
      return { device, region: index === 0 ? first : device.memory.share(first) };
    });
    for (const { device, region } of added) await device.addRegion(region);
    await Bun.sleep(5);
    for (const { device, region } of added) {
      await device.removeRegion(region);
      device.memory.drop(region);
    }
  }

  async end(): Promise<void> {
    for (const io of this.io) expect(await io.stop()).toBeGreaterThan(0);
  }

  [Symbol.dispose](): void {
    for (const log of this.logs) log[Symbol.dispose]();
  }

  private async goOn(device: VhostUserFrontend, bases: readonly number[]): Promise<void> {
    await device.setFeatures();
    await device.setStatus(Status.featuresOk);
    for (const queue of device.queues) await device.setupQueue(queue, bases[queue.index]);
    if ((device.features & LOG_ALL) !== 0n) await setLogBase(device, this.log);
    await device.enableAll(true);
    await device.setStatus(RUNNING);
    await device.askU64(Request.GET_STATUS);
  }

  private differences(): number[] {
    return this.memory.regions.flatMap(({ file }) => {
      const pages = Array.from({ length: file.size / LOG_PAGE }, (_, index) => file.gpa / LOG_PAGE + index);
      const isOther = (page: number) => {
        const copy = this.copies.get(page);
        return copy === undefined || Buffer.compare(copy, this.memory.read(page * LOG_PAGE, LOG_PAGE)) !== 0;
      };
      return pages.filter(isOther);
    });
  }

  private copy(page: number): void {
    const gpa = page * LOG_PAGE;
    // Of what lies between regions pages may be marked, too.
    const there = this.memory.regions.some(({ file }) => gpa >= file.gpa && gpa < file.gpa + file.size);
    if (there) this.copies.set(page, this.memory.read(gpa, LOG_PAGE));
  }

  private renewLog(): void {
    this.logs.push(new FrontendDirtyLog(END));
  }

  private get log(): FrontendDirtyLog {
    return this.logs.at(-1)!;
  }

  /** Of the VM: what the devices have is the same. */
  private get memory() {
    return this.devices[0]!.memory;
  }
}

const STEPS: Readonly<Record<string, (vm: MigratingVm, lab: RegistryLab) => Promise<void>>> = {
  "another pass": async (vm) => vm.pass(),
  "another log": (vm) => vm.otherLog(),
  "pause, old order, the same log": (vm) => vm.pause("old", false),
  "pause, new order, another log": (vm) => vm.pause("new", true),
  "one device": (vm) => vm.pauseOne(),
  "a ring that is disabled and enabled": (vm) => vm.toggle(),
  "memory that comes and goes": (vm) => vm.changeMemory(),
  "cancelled and begun again": async (vm) => {
    await vm.cancel();
    await vm.begin();
  },
  "another process of the daemon": async (_vm, lab) => {
    await lab.registry.abandon();
    lab.registry = lab.newRegistry();
    await lab.registry.revive();
  },
};

/** Each after several others. */
const ORDER = [1, 4].flatMap((stride) => {
  const names = Object.keys(STEPS);
  return names.map((_, index) => names[(index * stride) % names.length]!);
});

/** Another device of the same VM, with rings of its own. */
async function runBeside(first: VhostUserFrontend, frontend: VhostUserFrontend): Promise<void> {
  await frontend.negotiate();
  // Rings are made in the last region.
  for (const region of first.memory.regions.toReversed()) frontend.memory.share(region);
  await frontend.handMemory();
  await frontend.startQueues(2);
}

describe("memory is right whenever the VM stands, and no request is lost", () => {
  for (const [mode, vfs] of [
    ["pushBitmap", 1],
    ["pushBitmap", 2],
    ["pushBytemap", 1],
    ["pullBitmap", 2],
    ["pullBytemap", 1],
  ] as const) {
    test(`${mode}, devices: ${vfs}`, async () => {
      const before = liveFds();
      {
        const options = ["--tracking", TRACKING_LABEL[mode], "--queues", "2"];
        await using lab = await RegistryLab.create({ softvf: options });
        await lab.registry.addPf(lab.pf);
        await lab.serve(lab.vf);
        using first = lab.dial(lab.vf);
        await lab.run(first, 2);
        using others = new DisposableStack();
        const devices = [first];
        if (vfs === 2) {
          await lab.serve(lab.vf2);
          const second = others.use(lab.dial(lab.vf2));
          await runBeside(first, second);
          devices.push(second);
        }
        for (let at = 0; at < CONTENT.length; at += READ) {
          const { readable, writable } = writeRequest(at / SECTOR, CONTENT.subarray(at, at + READ));
          await first.queues[0]!.driver.request(readable, writable);
        }
        using vm = new MigratingVm(devices);
        await vm.begin();
        for (const name of ORDER) {
          await Bun.sleep(2);
          await STEPS[name]!(vm, lab);
        }
        await vm.pause("new", false);
        await vm.end();
        expect(lab.warnings).toEqual([]);
      }
      expect(liveFds()).toBe(before);
    }, 60_000);
  }
});

/** QEMU takes a connection that is lost for a device that has stopped. */
for (const mode of TRACKING_MODES) {
  test(`a front-end whose device dies finds all pages marked: ${mode}`, async () => {
    await using lab = await RegistryLab.create({ softvf: ["--tracking", TRACKING_LABEL[mode]] });
    await lab.registry.addPf(lab.pf);
    await lab.serve();
    using frontend = lab.dial();
    await lab.run(frontend);
    using log = new FrontendDirtyLog(frontend.memory.end);
    await startLogging(frontend, log);
    await lab.softvf.kill();
    await frontend.hungUp();
    const pages = frontend.memory.regions.reduce((sum, { file }) => sum + file.size / LOG_PAGE, 0);
    expect(log.look()).toHaveLength(pages);
  }, 30_000);
}

for (const fault of ["fail", "retry", "silence"]) {
  test(`a VM moves away from a device that does not stop: ${fault}`, async () => {
    const deadlines = { drain: 500, lastDrain: 300 };
    await using lab = await RegistryLab.create({ softvf: ["--tracking", "pull-bitmap"], deadlines });
    await lab.registry.addPf(lab.pf);
    await lab.serve();
    await lab.serve(lab.vf2);
    using source = lab.dial();
    using destination = lab.dial(lab.vf2);
    await lab.run(source);
    const disk = new VerifiedDisk();
    await disk.steps(source.queues[0]!.driver, 20);
    using migration = await Migration.begin([source]);
    const load = disk.runOn(source.queues[0]!.driver, 4);
    await lab.set(lab.pf, { "admin-fault": `modify:${fault}` });
    await migration.stop({ order: "old" });
    migration.pass();
    expect(migration.differences()).toEqual([]);
    // The destination's VF is of the same PF, and stands by as soon as a front-end has come.
    await lab.set(lab.pf, { "admin-fault": "" });
    await destination.negotiate();
    await migration.arrive([destination]);
    const { done } = load;
    while (load.done < done + 20) await Bun.sleep(1);
    await load.stop();
    expect(lab.warnings.filter((line) => line.includes("because it does not stop"))).toHaveLength(1);
  }, 30_000);
}
