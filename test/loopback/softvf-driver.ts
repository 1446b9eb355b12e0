import { mkdtemp, rm, truncate, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { softDevice } from "../../plugins/blk/soft-device.ts";
import { Deadline } from "../../src/base/deadline.ts";
import { type Logger, silentLogger } from "../../src/base/log.ts";
import { watch } from "../../src/native/poller.ts";
import { drainEventfd, eventfd, fileInfo } from "../../src/native/sys.ts";
import { type PciAddress, parsePciAddress } from "../../src/pci/address.ts";
import { VfioUserFunction } from "../../src/pci/vfio-user/function.ts";
import type { DeviceClass, SoftDeviceClass, SoftOptionValues } from "../../src/plugin.ts";
import { BusDirectory } from "../../src/softvf/bus-directory.ts";
import { PhysicalFunction, type ServedFunction } from "../../src/softvf/physical-function.ts";
import { FeatureBit, featureBits } from "../../src/virtio/features.ts";
import { VirtioPciDevice } from "../../src/virtio/pci-device.ts";
import { PciCommand, PciConfig } from "../../src/virtio/registers.ts";
import { type BlkRequest, blkResult } from "../kit/blk-requests.ts";
import { DriverQueue } from "../kit/driver-queue.ts";
import { DriverRing } from "../kit/driver-ring.ts";
import { GuestMemoryFile } from "../kit/guest-memory-file.ts";

const TIMEOUT = 5000;
const DISK_SIZE = 8 << 20;
const BUFFER_SPACE = 1 << 20;
/** That a driver's memory has room for. */
const QUEUES_MAX = 5;
export const GUEST_BASE = 0x1_0000_0000;

/** What the tests negotiate unless they say otherwise. */
export const USUAL_FEATURES = featureBits(
  FeatureBit.version1,
  FeatureBit.accessPlatform,
  FeatureBit.ringIndirectDesc,
  FeatureBit.ringEventIdx,
  ...[1, 2, 6, 9, 10, 11, 12, 13, 14],
);

/** A device class with a software device. */
export type SoftClass = DeviceClass & { readonly softDevice: SoftDeviceClass };

const BLK: SoftClass = {
  name: "blk",
  virtioId: 2,
  configSpace: {},
  features: { names: {} },
  queues: () => 1,
  softDevice,
};

/** A served PF with its VFs, in a temporary directory. */
export class TestVfs implements AsyncDisposable {
  private constructor(
    private readonly directory: string,
    private readonly bus: BusDirectory,
    private readonly pf: PhysicalFunction,
    /** What the functions have warned of, oldest first. */
    readonly warnings: readonly string[],
  ) {}

  /** Block VFs on images of their own. */
  static async serve(
    count: number,
    options: SoftOptionValues = {},
    pfOptions: SoftOptionValues = {},
  ): Promise<TestVfs> {
    return TestVfs.serveClass(
      BLK,
      count,
      async (directory) => {
        for (let vf = 0; vf < count; vf++) {
          await writeFile(join(directory, `disk${vf}`), "");
          await truncate(join(directory, `disk${vf}`), DISK_SIZE);
        }
        return { disk: join(directory, "disk{vf}"), queues: 4, ...options };
      },
      pfOptions,
    );
  }

  /** @param options of the VFs, given the temporary directory */
  static async serveClass(
    deviceClass: SoftClass,
    count: number,
    options: (directory: string) => Promise<SoftOptionValues>,
    pfOptions: SoftOptionValues = {},
  ): Promise<TestVfs> {
    await using undo = new AsyncDisposableStack();
    const directory = await mkdtemp(join(tmpdir(), "softvf-"));
    undo.defer(() => rm(directory, { recursive: true, force: true }));
    const given = await options(directory);
    const bus = new BusDirectory(join(directory, "devices"));
    await bus.prepare();
    const address = parsePciAddress("0000:5a:00.0");
    const warnings: string[] = [];
    const pf = await PhysicalFunction.serve(
      { address, deviceClass, vfs: count, options: given, pfOptions },
      bus,
      collect(warnings),
    );
    undo.move();
    return new TestVfs(directory, bus, pf, warnings);
  }

  vf(index: number): ServedFunction {
    return this.pf.functions[index + 1]!;
  }

  /** The PF itself. */
  get physical(): ServedFunction {
    return this.pf.functions[0]!;
  }

  disk(index: number): string {
    return join(this.directory, `disk${index}`);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.pf.close();
    await this.bus.remove();
    await rm(this.directory, { recursive: true, force: true });
  }
}

/** A function of this process or another. */
export interface Reachable {
  readonly address: PciAddress;
  readonly server: { readonly path: string };
}

/** A driver of one VF: connects, maps memory, sets queues up and does block requests. */
export class TestDriver implements AsyncDisposable {
  readonly queues: DriverQueue[] = [];
  /** Signals of the configuration vector. */
  configCalls = 0;
  private readonly onConfig: (() => void)[] = [];
  private readonly resources = new DisposableStack();

  private constructor(
    readonly fn: VfioUserFunction,
    readonly device: VirtioPciDevice,
    readonly memory: GuestMemoryFile,
    readonly features: bigint,
  ) {
    this.resources.use(memory);
  }

  /** Up to FEATURES_OK, memory mapped. */
  static async connect(served: Reachable, features = USUAL_FEATURES): Promise<TestDriver> {
    const deadline = Deadline.after(TIMEOUT, "connect");
    const fn = await VfioUserFunction.connect(served.address, served.server.path, deadline);
    await fn.config.write(PciConfig.command, 2, PciCommand.memory | PciCommand.busMaster);
    const device = await VirtioPciDevice.probe(fn, deadline);
    await device.reset(deadline);
    await device.negotiate(features & (await device.features()));
    const memory = new GuestMemoryFile(GUEST_BASE, QUEUES_MAX * DriverRing.span(64, BUFFER_SPACE));
    const driver = new TestDriver(fn, device, memory, features);
    await driver.map(memory);
    return driver;
  }

  /** Connected and running with `count` queues. */
  static async start(served: Reachable, count = 1, features = USUAL_FEATURES): Promise<TestDriver> {
    const driver = await TestDriver.connect(served, features);
    await driver.run(count);
    return driver;
  }

  async map(memory: GuestMemoryFile, gpa = memory.gpa, size = memory.size, offset = 0): Promise<void> {
    const { dev, ino } = fileInfo(memory.file.number);
    const range = { iova: gpa, size, offset, file: { dev, ino } };
    await this.fn.dmaMap(range, memory.file.number, Deadline.after(TIMEOUT, "map"));
  }

  async unmap(gpa: number, size: number): Promise<void> {
    await this.fn.dmaUnmap({ iova: gpa, size, offset: 0, file: { dev: 0, ino: 0 } }, Deadline.after(TIMEOUT, "unmap"));
  }

  async run(count: number): Promise<void> {
    const config = this.resources.use(eventfd());
    const watching = this.resources.use(
      watch(config.number, "in", () => {
        this.configCalls += drainEventfd(config.number);
        watching.rearm();
        this.onConfig.splice(0).forEach((resolve) => {
          resolve();
        });
      }),
    );
    watching.unref();
    await this.fn.interrupts.route(0, config.number);
    for (let index = 0; index < count; index++) {
      const ring = new DriverRing({
        memory: this.memory,
        base: GUEST_BASE + index * DriverRing.span(64, BUFFER_SPACE),
        size: 64,
        features: this.features,
        bufferSpace: BUFFER_SPACE,
      });
      const doorbell = this.fn.doorbell(4, 0x3000 + 0x1000 * index);
      const queue = this.resources.use(new DriverQueue(ring, () => void doorbell.ring(index)));
      this.queues.push(queue);
      await this.fn.interrupts.route(index + 1, queue.call.number);
    }
    await this.device.setUpQueues(
      0,
      this.queues.map(({ ring: { size, desc, driver, device } }, index) => {
        return { index, size, vector: index + 1, desc, driver, device, lastAvail: 0, lastUsed: 0 };
      }),
    );
    await this.device.run();
  }

  /** Resolves with the next configuration interrupt. */
  configInterrupt(): Promise<void> {
    const seen = new Promise<void>((resolve) => this.onConfig.push(resolve));
    return Deadline.after(TIMEOUT, "a configuration interrupt").race(seen);
  }

  async request(request: BlkRequest, queue = 0) {
    const completed = this.queues[queue]!.request(request.readable, request.writable);
    const done = await Deadline.after(TIMEOUT, "a block request").race(completed);
    return { ...blkResult(done), length: done.length };
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.fn[Symbol.asyncDispose]();
    this.resources.dispose();
  }
}

function collect(warnings: string[]): Logger {
  return { ...silentLogger, warn: (message) => void warnings.push(message), child: () => collect(warnings) };
}

/** Bytes that differ from sector to sector and from seed to seed. */
export function pattern(length: number, seed: number): Uint8Array {
  const bytes = new Uint8Array(length);
  let state = seed * 2654435761 + 1;
  for (let at = 0; at < length; at++) {
    state = (state * 1103515245 + 12345) & 0x7fffffff;
    bytes[at] = state >> 16;
  }
  return bytes;
}
