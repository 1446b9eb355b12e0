import { Deadline } from "../../src/base/deadline.ts";
import { eventfd, fileInfo, signalEventfd } from "../../src/native/sys.ts";
import { DmaDomain } from "../../src/pci/dma-domain.ts";
import type { PciFunction } from "../../src/pci/function.ts";
import { VfioUserAddressSpace } from "../../src/pci/vfio-user/address-space.ts";
import { VfioUserFunction } from "../../src/pci/vfio-user/function.ts";
import type { VendorAdmin } from "../../src/virtio/admin/vendor-admin.ts";
import { DataPath } from "../../src/virtio/data-path.ts";
import type { DeviceState } from "../../src/virtio/device-state.ts";
import type { FreezeMode, MoverFactory } from "../../src/virtio/mover.ts";
import { VendorMover } from "../../src/virtio/movers/vendor.ts";
import { DriverQueue } from "../kit/driver-queue.ts";
import { DriverRing } from "../kit/driver-ring.ts";
import { fakeClass } from "../kit/fake-class.ts";
import { GuestMemoryFile } from "../kit/guest-memory-file.ts";
import { type BackgroundIo, VerifiedDisk } from "../kit/verified-disk.ts";
import { GUEST_BASE, type Reachable, USUAL_FEATURES } from "./softvf-driver.ts";

const TIMEOUT = 15_000;
const RING = 64;
const SPACE = 1 << 20;
const BLOCKS = 16;
const QUEUES = 2;
const CONFIG_SIZE = 60;

/** A guest whose VF is moved by the admin queue of its PF, through the data path that the daemon has. */
export class ManagedGuest implements AsyncDisposable {
  private state: DeviceState;
  private streams: BackgroundIo[] = [];

  private constructor(
    readonly path: DataPath,
    private readonly memory: GuestMemoryFile,
    private readonly queues: readonly DriverQueue[],
    private readonly kicks: readonly number[],
    private readonly resources: AsyncDisposableStack,
    firstIndex: number,
  ) {
    this.state = {
      features: USUAL_FEATURES,
      status: 0x0f,
      configVector: 0,
      config: new Uint8Array(0),
      queues: queues.map(({ ring: { size, desc, driver, device } }, index) => {
        return { index, size, vector: index + 1, desc, driver, device, lastAvail: firstIndex, lastUsed: firstIndex };
      }),
    };
  }

  /** @param firstIndex where both indices of all rings begin */
  static async connect(vf: Reachable, admin: VendorAdmin, vdevId: number, firstIndex = 0): Promise<ManagedGuest> {
    await using stack = new AsyncDisposableStack();
    const deadline = Deadline.after(TIMEOUT, "the guest's device");
    const fn: PciFunction = stack.use(await VfioUserFunction.connect(vf.address, vf.server.path, deadline));
    const makeMover: MoverFactory = (host, snapshot) => new VendorMover(host, { admin, vdevId }, snapshot);
    const path = await DataPath.open(fn, () => fakeClass(), deadline, makeMover);
    stack.defer(() => path.abandon());
    const memory = stack.use(new GuestMemoryFile(GUEST_BASE, QUEUES * DriverRing.span(RING, SPACE)));
    const domain = new DmaDomain(new VfioUserAddressSpace());
    stack.defer(() => domain.abandon());
    await domain.attach(fn);
    const { dev, ino } = fileInfo(memory.file.number);
    await domain.claim(
      "guest",
      { iova: GUEST_BASE, size: memory.size, offset: 0, file: { dev, ino } },
      memory.file.number,
    );
    const kicks = Array.from({ length: QUEUES }, () => stack.use(eventfd()).number);
    const queues = kicks.map((kick, index) => {
      const base = GUEST_BASE + index * DriverRing.span(RING, SPACE);
      const ring = new DriverRing({
        memory,
        base,
        size: RING,
        features: USUAL_FEATURES,
        bufferSpace: SPACE,
        firstIndex,
      });
      return stack.use(new DriverQueue(ring, () => signalEventfd(kick)));
    });
    return new ManagedGuest(path, memory, queues, kicks, stack.move(), firstIndex);
  }

  /** @param timeout milliseconds */
  async start(timeout = TIMEOUT): Promise<void> {
    const eventfds = this.queues.map(
      ({ call }, index) => [index, { kick: this.kicks[index], call: call.number }] as const,
    );
    const wanted = { ...this.state, config: await this.path.readConfig(CONFIG_SIZE) };
    await this.path.start(wanted, new Map(eventfds), Deadline.after(timeout, "the start"));
  }

  /** The next start goes on from here. */
  async stop(mode: FreezeMode, timeout = TIMEOUT): Promise<DeviceState> {
    this.state = await this.path.stop(this.memory, mode, Deadline.after(timeout, "the stop"));
    return this.state;
  }

  async reset(): Promise<void> {
    await this.path.reset(Deadline.after(TIMEOUT, "the reset"));
  }

  /** Starts that many streams of verified requests a queue. */
  load(streams: number): void {
    for (const [index, queue] of this.queues.entries()) {
      for (let stream = 0; stream < streams; stream++) {
        this.streams.push(new VerifiedDisk((index * streams + stream) * BLOCKS, BLOCKS).runOn(queue));
      }
    }
  }

  /** Resolves when that many more requests are done. */
  async progress(requests: number): Promise<void> {
    const done = () => this.streams.reduce((sum, stream) => sum + stream.done, 0);
    const goal = done() + requests;
    await Deadline.after(TIMEOUT, `${requests} requests`).poll(() => done() >= goal || undefined, 1);
  }

  /** Ends the load; throws what went wrong with it. */
  async unload(): Promise<void> {
    const streams = this.streams.splice(0);
    await Deadline.after(TIMEOUT, "the end of the load").race(Promise.all(streams.map((stream) => stream.stop())));
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.resources.disposeAsync();
  }
}
