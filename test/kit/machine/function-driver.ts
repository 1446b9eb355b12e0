import { Deadline } from "../../../src/base/deadline.ts";
import { silentLogger } from "../../../src/base/log.ts";
import { fileInfo } from "../../../src/native/sys.ts";
import { parsePciAddress } from "../../../src/pci/address.ts";
import { Bus } from "../../../src/pci/bus.ts";
import { DmaDomain } from "../../../src/pci/dma-domain.ts";
import { VfioAddressSpace } from "../../../src/pci/vfio/address-space.ts";
import { VfioFunction } from "../../../src/pci/vfio/function.ts";
import { FeatureBit, featureBits } from "../../../src/virtio/features.ts";
import { type QueueLimits, VirtioPciDevice } from "../../../src/virtio/pci-device.ts";
import { NO_VECTOR } from "../../../src/virtio/registers.ts";
import { DriverQueue } from "../driver-queue.ts";
import { DriverRing } from "../driver-ring.ts";
import { GuestMemoryFile } from "../guest-memory-file.ts";

const SYSFS_PCI = "/sys/bus/pci/devices";
/** Milliseconds, on a machine that is emulated. */
const TIMEOUT = 20_000;
const RING = 64;
const BUFFER_SPACE = 1 << 20;
const QUEUES_MAX = 4;
const GUEST_BASE = 0x1_0000_0000;
const FEATURES = featureBits(FeatureBit.version1, FeatureBit.accessPlatform);

/** A driver of one function of the machine, in an address space of its own: as much as a daemon does, and no daemon. */
export class FunctionDriver implements AsyncDisposable {
  readonly queues: DriverQueue[] = [];
  limits: readonly QueueLimits[] = [];

  private constructor(
    readonly fn: VfioFunction,
    readonly device: VirtioPciDevice,
    private readonly undo: AsyncDisposableStack,
    private readonly memory: GuestMemoryFile,
  ) {}

  /**
   * Opens a function that is bound to vfio-pci; memory mapped.
   * @param address PCI address
   * @param timeout milliseconds
   */
  static async open(address: string, timeout = TIMEOUT): Promise<FunctionDriver> {
    await using undo = new AsyncDisposableStack();
    const deadline = Deadline.after(timeout, `opening of ${address}`);
    const settings = { interface: "auto", token: async () => crypto.randomUUID(), log: silentLogger } as const;
    const space = undo.use(new VfioAddressSpace("the test", settings));
    const domain = new DmaDomain(space);
    const entry = await new Bus([SYSFS_PCI]).find(parsePciAddress(address));
    if (entry === undefined) throw new Error(`there is no ${address}`);
    const fn = undo.use(await domain.open(entry, deadline));
    if (!(fn instanceof VfioFunction)) throw new Error(`${address} is no function of kernel VFIO`);
    await domain.attach(fn);
    const memory = undo.use(new GuestMemoryFile(GUEST_BASE, QUEUES_MAX * DriverRing.span(RING, BUFFER_SPACE)));
    const { dev, ino } = fileInfo(memory.file.number);
    const range = { iova: GUEST_BASE, size: memory.size, file: { dev, ino }, offset: 0 };
    await domain.claim("the test", range, memory.file.number);
    undo.defer(() => domain.releaseAll("the test"));
    const device = await VirtioPciDevice.probe(fn, deadline);
    return new FunctionDriver(fn, device, undo.move(), memory);
  }

  /**
   * Resets the device, and starts queues, their vectors routed to their calls.
   * @param ring how a doorbell is rung; by this process unless said
   */
  async start(count: number, ring: (queue: number) => void = (queue) => void this.ring(queue)): Promise<void> {
    const deadline = Deadline.after(TIMEOUT, `start of ${this.fn.address}`);
    for (const queue of this.queues.splice(0)) queue[Symbol.dispose]();
    await this.device.reset(deadline);
    await this.device.negotiate(FEATURES);
    this.limits = await this.device.queueLimits();
    for (let index = 0; index < count; index++) {
      const base = GUEST_BASE + index * DriverRing.span(RING, BUFFER_SPACE);
      const { memory } = this;
      const own = new DriverRing({ memory, base, size: RING, features: FEATURES, bufferSpace: BUFFER_SPACE });
      const queue = new DriverQueue(own, () => ring(index));
      this.queues.push(queue);
      await this.fn.interrupts.route(index + 1, queue.call.number);
    }
    const states = this.queues.map(({ ring: { size, desc, driver, device } }, index) => {
      return { index, size, vector: index + 1, desc, driver, device, lastAvail: 0, lastUsed: 0 };
    });
    await this.device.setUpQueues(NO_VECTOR, states);
    await this.device.run();
  }

  /** The doorbell of a queue that was started. */
  doorbell(queue: number) {
    return this.device.doorbell(queue, this.limits[queue]!.notifyOff);
  }

  ring(queue: number): Promise<void> {
    return this.doorbell(queue).ring(queue);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const queue of this.queues.splice(0)) queue[Symbol.dispose]();
    await this.undo.disposeAsync();
  }
}
