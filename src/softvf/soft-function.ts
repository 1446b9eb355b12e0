import { VhostdError } from "../base/errors.ts";
import type { Logger } from "../base/log.ts";
import type { OwnedFd } from "../native/fd.ts";
import { RingEngine, type RingStats } from "../native/ring-engine.ts";
import type { RingLog } from "../native/ring-log.ts";
import type { PciAddress } from "../pci/address.ts";
import type { SoftDevice, SoftOptionValue } from "../plugin.ts";
import { InterruptRoutes } from "./interrupts.ts";
import { type FunctionLayout, functionLayout, MSIX_BAR, NOTIFY_MULTIPLIER, VIRTIO_BAR, VirtioBlock } from "./layout.ts";
import { MemoryShare } from "./memory-share.ts";
import { CONFIG_SPACE_SIZE, PciConfigSpace, type PciIdentity } from "./pci-config-space.ts";
import { RequestService, type RequestSource } from "./request-service.ts";
import { VirtioDevice } from "./virtio-device.ts";

export interface SoftFunctionOptions {
  readonly address: PciAddress;
  readonly identity: PciIdentity;
  /** Largest size of each queue, entries. */
  readonly ringSize: number;
  /** MSI-X vectors; one for each queue and one for the configuration unless said. */
  readonly vectors?: number;
  /**
   * With the worker "forward": chains have come. The device serves them unless said. Called by the poller, which an
   * error would end.
   */
  readonly onRequests?: (rings: RequestSource) => void;
}

/** Index of the region that is the PCI configuration space; 0 to 5 are the base address registers. */
const CONFIG_REGION = 7;

/** One PCI function made of software: configuration space, registers, interrupts, memory, rings. */
export class SoftFunction implements Disposable {
  readonly address: PciAddress;
  readonly identity: PciIdentity;
  readonly layout: FunctionLayout;
  readonly virtio: VirtioDevice;
  readonly interrupts: InterruptRoutes;
  private readonly config: PciConfigSpace;
  private readonly msix: Uint8Array;
  private readonly rings: RingEngine;
  private readonly device: SoftDevice;
  private readonly memory: MemoryShare;
  private readonly resources = new DisposableStack();

  /** Takes the device. @throws VhostdError invalid where its worker does not exist or refuses its parameters */
  constructor(
    options: SoftFunctionOptions,
    device: SoftDevice,
    private readonly log: Logger,
  ) {
    using undo = new DisposableStack();
    this.device = undo.use(device);
    this.memory = undo.use(new MemoryShare());
    this.address = options.address;
    this.identity = options.identity;
    const vectors = options.vectors ?? device.queues + 1;
    this.layout = functionLayout(device.queues, vectors, device.config().length);
    this.config = new PciConfigSpace(options.identity, this.layout);
    this.msix = new Uint8Array(this.layout.msixBarSize);
    const requests = this.requestService();
    const onRequests = options.onRequests ?? ((rings: RequestSource) => requests?.serve(rings));
    this.rings = undo.use(
      new RingEngine(
        device.worker,
        device.queues,
        (reason) => this.onRingFailure(reason),
        () => onRequests(this.rings),
        (up) => {
          this.log.warn(up ? "somebody is at the other end again" : "nobody is at the other end any more");
          void this.onCarrier(up);
        },
      ),
    );
    this.interrupts = undo.use(
      new InterruptRoutes(this.layout.vectors, (vector) => this.virtio.onVectorRouted(vector)),
    );
    const isMaster = () => this.config.busMaster;
    this.virtio = new VirtioDevice(device, this.rings, options.ringSize, {
      vectors: this.layout.vectors,
      vectorFd: (vector) => this.interrupts.fd(vector),
      signal: (vector) => this.interrupts.signal(vector),
      get busMaster() {
        return isMaster();
      },
      log,
    });
    this.virtio.onDrop(() => requests?.forget());
    void this.onCarrier(this.rings.carrier());
    this.resources = undo.move();
  }

  /** Bytes; 0 where the function has no such region. */
  regionSize(region: number): number {
    if (region === CONFIG_REGION) return CONFIG_SPACE_SIZE;
    if (region === VIRTIO_BAR) return this.layout.virtioBarSize;
    return region === MSIX_BAR ? this.layout.msixBarSize : 0;
  }

  /** The range lies inside the region. */
  read(region: number, offset: number, length: number): Uint8Array {
    if (region === CONFIG_REGION) return this.readPciConfig(offset, length);
    if (region === MSIX_BAR) return this.msix.slice(offset, offset + length);
    const { common, isr, device } = VirtioBlock;
    const inside = (block: { readonly offset: number; readonly size: number }) =>
      offset >= block.offset && offset + length <= block.offset + block.size;
    if (inside(common)) return this.virtio.readCommon(offset, length);
    if (inside(device)) return this.virtio.readConfig(offset - device.offset, length);
    const bytes = new Uint8Array(length);
    if (inside(isr) && offset === isr.offset) bytes[0] = this.virtio.readIsr();
    return bytes;
  }

  /** The range lies inside the region. Resolves when the write has had its effect. */
  async write(region: number, offset: number, data: Uint8Array): Promise<void> {
    if (region === CONFIG_REGION) return this.writePciConfig(offset, data);
    if (region === MSIX_BAR) {
      // Pending bits are the device's (PCI 3.0, 6.8.2.10).
      if (offset + data.length <= this.layout.pendingBits) this.msix.set(data, offset);
      return;
    }
    const { common, device, notify } = VirtioBlock;
    if (offset + data.length <= common.size) return this.virtio.writeCommon(offset, data);
    if (offset >= device.offset && offset + data.length <= device.offset + device.size) {
      return this.virtio.writeConfig(offset - device.offset, data);
    }
    const queue = (offset - notify.offset) / NOTIFY_MULTIPLIER;
    if (Number.isInteger(queue) && queue >= 0 && queue < this.layout.queues) this.rings.notify(queue);
  }

  /** Facts that its worker knows, by name. */
  info(): Readonly<Record<string, number>> {
    return this.rings.info();
  }

  /** Where the function marks the pages that it writes. */
  get dirtyLog(): RingLog {
    return this.rings.log;
  }

  /** Borrowed: a signal is a write to the queue's place in the notification block. */
  doorbell(queue: number): number {
    return this.rings.doorbell(queue);
  }

  /**
   * Signals of an eventfd, which is borrowed for the call, notify the queue too; null: no longer. It stays through
   * resets, as the interrupt routes do, until the client is gone.
   * @throws VhostdError limitExceeded where no descriptor is left
   */
  setKick(queue: number, eventfd: number | null): void {
    this.rings.setKick(queue, eventfd);
  }

  /** A vector goes to an eventfd, which is taken, or nowhere. */
  route(vector: number, eventfd: OwnedFd | undefined): void {
    this.interrupts.route(vector, eventfd);
  }

  /** Ranges that a client may map. */
  get maxDmaMaps(): number {
    return this.memory.limits.ranges;
  }

  /**
   * The fd is borrowed until the promise settles.
   * @throws SystemError EEXIST where it overlaps, EINVAL where the file is shorter, ENOSPC where too much is mapped;
   * VhostdError timedOut while the worker hangs in the disk
   */
  async map(iova: number, size: number, fd: number, offset: number, writable: boolean): Promise<void> {
    this.memory.take(size);
    try {
      await this.rings.map(iova, size, fd, offset, writable);
    } catch (error) {
      this.memory.give(size);
      throw error;
    }
  }

  /** @throws SystemError ENOENT unless exactly this range was mapped; VhostdError timedOut */
  async unmap(iova: number, size: number): Promise<void> {
    await this.virtio.unmapping(() => this.rings.unmap(iova, size));
    this.memory.give(size);
  }

  /** @throws VhostdError timedOut */
  async unmapAll(): Promise<void> {
    await this.virtio.unmapping(() => this.rings.unmapAll());
    this.memory.giveAll();
  }

  /** Function-level reset; the PCI configuration space and the interrupt routes stay, as with the kernel's VFIO. */
  async reset(): Promise<void> {
    await this.virtio.reset();
    this.msix.fill(0);
  }

  /** As if it had just been made: the client is gone. However long the worker hangs in the disk: it has its memory. */
  async release(): Promise<void> {
    try {
      for (let queue = 0; queue < this.layout.queues; queue++) this.setKick(queue, null);
      while (!(await this.tryReset())) {
        this.log.error("the ring worker does not end, it hangs in the disk: no client is served until it does");
      }
    } finally {
      this.interrupts.clear();
      this.config.reset();
      await this.unmapAll();
    }
  }

  /** @throws Error of the class where `set` would not take the value */
  check(option: string, value: SoftOptionValue): void {
    this.device.check?.(option, value);
  }

  /** @throws Error of the class where the value does not fit; VhostdError timedOut */
  async set(option: string, value: SoftOptionValue): Promise<void> {
    await this.virtio.set(option, value);
  }

  stats(): readonly RingStats[] {
    return this.rings.stats();
  }

  /** Device configuration space as a driver reads it now. */
  deviceConfig(): Uint8Array {
    return this.device.config();
  }

  [Symbol.dispose](): void {
    this.resources.dispose();
  }

  /** Called by the poller, which an error would end. */
  private onRingFailure(reason: string): void {
    try {
      this.virtio.fail(reason);
    } catch (error) {
      this.log.error("the driver could not be told that the function needs a reset", error);
    }
  }

  /** Likewise. */
  private async onCarrier(up: boolean): Promise<void> {
    try {
      await this.virtio.carrierChanged(up);
    } catch (error) {
      this.log.error(`the driver could not be told that the link is ${up ? "up" : "down"}`, error);
    }
  }

  /** For a class that serves its requests itself. @throws VhostdError invalid where nobody would */
  private requestService(): RequestService | undefined {
    const { device } = this;
    if (device.serve === undefined) return undefined;
    return new RequestService({
      serve: async (request) => device.serve!(request),
      fail: (reason) => this.onRingFailure(reason),
    });
  }

  private async tryReset(): Promise<boolean> {
    try {
      await this.reset();
      return true;
    } catch (error) {
      if (error instanceof VhostdError && error.code === "timedOut") return false;
      throw error;
    }
  }

  private readPciConfig(offset: number, length: number): Uint8Array {
    const target = this.config.touchesWindow(offset, length) ? this.windowTarget() : undefined;
    if (target !== undefined) this.config.showInWindow(this.read(target.bar, target.offset, target.length));
    return this.config.read(offset, length);
  }

  /** What a driver reaches through the configuration space: one register (VIRTIO 1.2, 4.1.4.9.1). */
  private windowTarget() {
    const { window } = this.config;
    const { bar, offset, length } = window;
    const fits = [1, 2, 4].includes(length) && offset % length === 0 && bar < CONFIG_REGION;
    return fits && offset + length <= this.regionSize(bar) ? window : undefined;
  }

  private async writePciConfig(offset: number, data: Uint8Array): Promise<void> {
    const effects = this.config.write(offset, data);
    if (effects.includes("functionReset")) await this.reset();
    if (effects.includes("busMaster")) await this.virtio.onBusMaster();
    const target = effects.includes("windowWrite") ? this.windowTarget() : undefined;
    if (target === undefined) return;
    const value = new Uint8Array(Uint32Array.of(target.data).buffer, 0, target.length);
    await this.write(target.bar, target.offset, value);
  }
}
