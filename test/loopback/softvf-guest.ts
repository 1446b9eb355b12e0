import { Deadline } from "../../src/base/deadline.ts";
import { fileInfo, signalEventfd } from "../../src/native/sys.ts";
import { VfioUserFunction } from "../../src/pci/vfio-user/function.ts";
import { encodeState, type VendorState } from "../../src/virtio/admin/state-blob.ts";
import { VirtioPciDevice } from "../../src/virtio/pci-device.ts";
import { NO_VECTOR } from "../../src/virtio/registers.ts";
import { usedIndex } from "../../src/virtio/split-ring.ts";
import { DriverQueue } from "../kit/driver-queue.ts";
import { DriverRing } from "../kit/driver-ring.ts";
import { GuestMemoryFile } from "../kit/guest-memory-file.ts";
import { type BackgroundIo, VerifiedDisk } from "../kit/verified-disk.ts";
import { GUEST_BASE, type Reachable, USUAL_FEATURES } from "./softvf-driver.ts";

const TIMEOUT = 15_000;
const RING = 64;
const SPACE = 1 << 20;
/** Blocks of 4 KiB that each stream of requests has to itself. */
const BLOCKS = 16;

const soon = (what: string) => Deadline.after(TIMEOUT, what);

/** A guest with two rings, whose device is one VF after another without its noticing. */
export class MovedGuest implements AsyncDisposable {
  readonly queues: readonly DriverQueue[];
  device: VirtioPciDevice | undefined;
  readonly memory = new GuestMemoryFile(GUEST_BASE, 2 * DriverRing.span(RING, SPACE));
  private fn: VfioUserFunction | undefined;
  private streams: BackgroundIo[] = [];

  /** @param firstIndex where both indices of all rings begin */
  constructor(
    private readonly firstIndex = 0,
    readonly features = USUAL_FEATURES,
  ) {
    this.queues = [0, 1].map((index) => {
      const base = GUEST_BASE + index * DriverRing.span(RING, SPACE);
      const { memory } = this;
      const ring = new DriverRing({ memory, base, size: RING, features, bufferSpace: SPACE, firstIndex });
      return new DriverQueue(ring, () => this.kick(index));
    });
  }

  /** The VF reaches the guest's memory, and interrupts go to the guest; its registers stay. */
  async plug(vf: Reachable): Promise<void> {
    const deadline = soon("plugging");
    const fn = await VfioUserFunction.connect(vf.address, vf.server.path, deadline);
    this.device = await VirtioPciDevice.probe(fn, deadline);
    // A restored device has nobody who negotiates with it.
    await this.device.setBusMaster(true);
    const { dev, ino } = fileInfo(this.memory.file.number);
    const range = { iova: GUEST_BASE, size: this.memory.size, offset: 0, file: { dev, ino } };
    await fn.dmaMap(range, this.memory.file.number, deadline);
    for (const [index, { call }] of this.queues.entries()) await fn.interrupts.route(index + 1, call.number);
    this.fn = fn;
  }

  /** The VF is let go of: it is reset. */
  async unplug(): Promise<void> {
    const { fn } = this;
    this.fn = undefined;
    await fn?.[Symbol.asyncDispose]();
  }

  async unmap(): Promise<void> {
    await this.fn!.dmaUnmap(this.range, soon("unmapping"));
  }

  async map(): Promise<void> {
    await this.fn!.dmaMap(this.range, this.memory.file.number, soon("mapping"));
  }

  /** What a device needs to begin to serve the rings. */
  state(change: Partial<VendorState["common"]> = {}): VendorState {
    return {
      common: {
        deviceFeatureSelect: 0,
        deviceFeatures: this.features,
        driverFeatureSelect: 0,
        driverFeatures: this.features,
        configVector: NO_VECTOR,
        numQueues: 2,
        queueSelect: 0,
        status: 0x0f,
        configGeneration: 0,
        ...change,
      },
      config: new Uint8Array(0),
      queues: this.queues.map(({ ring: { size, desc, driver, device } }, index) => ({
        index,
        size,
        vector: index + 1,
        enable: 1,
        notifyOff: index,
        desc: BigInt(desc),
        driver: BigInt(driver),
        device: BigInt(device),
        notifyData: 0,
        reset: 0,
      })),
      indices: this.queues.map((_, index) => ({ index, lastAvail: this.firstIndex, lastUsed: this.firstIndex })),
      inFlight: [],
      completed: [],
      others: [],
    };
  }

  blob(change: Partial<VendorState["common"]> = {}): Uint8Array {
    return encodeState(this.state(change));
  }

  /** What happened while nobody looked: each doorbell and each call once. */
  wake(): void {
    for (const [index, { call }] of this.queues.entries()) {
      this.kick(index);
      signalEventfd(call.number);
    }
  }

  /** Used indices, as the driver sees them. */
  get used(): number[] {
    return this.queues.map(({ ring }) => usedIndex(this.memory, ring));
  }

  /** Starts that many streams of verified requests a queue. */
  load(streams: number): void {
    for (const [index, queue] of this.queues.entries()) {
      for (let stream = 0; stream < streams; stream++) {
        const disk = new VerifiedDisk((index * streams + stream) * BLOCKS, BLOCKS);
        this.streams.push(disk.runOn(queue));
      }
    }
  }

  /** Requests done so far. */
  get done(): number {
    return this.streams.reduce((sum, { done }) => sum + done, 0);
  }

  /** Resolves when that many more requests are done. */
  async progress(requests: number): Promise<void> {
    const goal = this.done + requests;
    await soon(`${requests} requests`).poll(() => this.done >= goal || undefined, 1);
  }

  /** Ends the load: everything that was asked for was done, once, and right. */
  async settle(): Promise<void> {
    await soon("the last requests").race(Promise.all(this.streams.splice(0).map((stream) => stream.stop())));
    const pending = this.queues.reduce((sum, { ring }) => sum + ring.pending, 0);
    if (pending !== 0) throw new Error(`${pending} requests are still with the device`);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.unplug();
    for (const queue of this.queues) queue[Symbol.dispose]();
    this.memory[Symbol.dispose]();
  }

  private get range() {
    const { dev, ino } = fileInfo(this.memory.file.number);
    return { iova: GUEST_BASE, size: this.memory.size, offset: 0, file: { dev, ino } };
  }

  private kick(queue: number): void {
    const { fn } = this;
    if (fn !== undefined) void fn.doorbell(4, 0x3000 + 0x1000 * queue).ring(queue);
  }
}
