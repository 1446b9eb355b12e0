import { duplicate, type OwnedFd } from "../../src/native/fd.ts";
import { pread, pwrite } from "../../src/native/sys.ts";
import type { AddressSpace, DmaRange } from "../../src/pci/address-space.ts";
import { DESCRIPTOR, DescriptorFlag, RING, USED_ELEMENT } from "../../src/virtio/split-ring.ts";

interface FakeMapping {
  readonly iova: number;
  readonly size: number;
  readonly offset: number;
  readonly fd: OwnedFd;
}

/** Memory as a device reaches it that is made of JavaScript: by the fds that were mapped. */
export class FakeDma implements AddressSpace, Disposable {
  readonly ioRanges = [{ start: 0, end: Number.MAX_SAFE_INTEGER }];
  readonly pageSize = 4096;
  private mappings: FakeMapping[] = [];

  /** What is mapped, oldest first. */
  get files(): readonly OwnedFd[] {
    return this.mappings.map(({ fd }) => fd);
  }

  /** @throws Error where it is not mapped */
  read(iova: number, length: number): Uint8Array {
    const bytes = new Uint8Array(length);
    const { fd, at } = this.find(iova, length);
    pread(fd.number, bytes, at);
    return bytes;
  }

  /** @throws Error where it is not mapped */
  write(iova: number, bytes: Uint8Array): void {
    const { fd, at } = this.find(iova, bytes.length);
    pwrite(fd.number, bytes, at);
  }

  readU16(iova: number): number {
    const [low = 0, high = 0] = this.read(iova, 2);
    return low | (high << 8);
  }

  writeU16(iova: number, value: number): void {
    this.write(iova, Uint8Array.of(value & 0xff, (value >> 8) & 0xff));
  }

  open(): never {
    throw new Error("has no functions to open");
  }

  revive(): never {
    throw new Error("has no functions to revive");
  }

  async attach(): Promise<void> {}

  async detach(): Promise<void> {}

  async map({ iova, size, offset }: DmaRange, fd: number): Promise<void> {
    this.mappings.push({ iova, size, offset, fd: duplicate(fd) });
  }

  async unmap(range: DmaRange): Promise<void> {
    for (const { iova, fd } of this.mappings) if (iova === range.iova) fd[Symbol.dispose]();
    this.mappings = this.mappings.filter(({ iova }) => iova !== range.iova);
  }

  async unmapIfThere(range: DmaRange): Promise<void> {
    await this.unmap(range);
  }

  adopt(): void {}

  [Symbol.dispose](): void {
    for (const { fd } of this.mappings.splice(0)) fd[Symbol.dispose]();
  }

  private find(iova: number, length: number): { fd: OwnedFd; at: number } {
    const found = this.mappings.find((one) => iova >= one.iova && iova + length <= one.iova + one.size);
    if (found === undefined) {
      throw new Error(`the driver named ${length} bytes at 0x${iova.toString(16)}, which are not mapped`);
    }
    return { fd: found.fd, at: iova - found.iova + found.offset };
  }
}

/** Where a queue is, as the registers of a function say. */
export interface FakeQueuePlace {
  readonly size: number;
  readonly desc: bigint;
  readonly driver: bigint;
  readonly device: bigint;
}

export interface FakeBuffer {
  readonly address: number;
  readonly length: number;
}

/** One chain as the device took it. */
export interface FakeChain {
  readonly head: number;
  readonly readable: readonly FakeBuffer[];
  readonly writable: readonly FakeBuffer[];
}

/** The device's side of a split ring, honest or not. Stands at the beginning. */
export class FakeDeviceRing {
  private taken = 0;

  constructor(
    private readonly dma: FakeDma,
    private readonly place: () => FakeQueuePlace,
  ) {}

  /** As a device that was reset. */
  restart(): void {
    this.taken = 0;
  }

  /** The next chain that is available, or undefined. */
  take(): FakeChain | undefined {
    const { driver, size, desc } = this.place();
    if (this.dma.readU16(Number(driver) + RING.index) === this.taken) return undefined;
    const head = this.dma.readU16(Number(driver) + RING.entries + 2 * (this.taken % size));
    this.taken = (this.taken + 1) & 0xffff;
    const chain: ReturnType<typeof DESCRIPTOR.read>[] = [];
    for (let at = head; ; at = chain.at(-1)!.next) {
      chain.push(DESCRIPTOR.read(this.dma.read(Number(desc) + DESCRIPTOR.size * at, DESCRIPTOR.size)));
      if ((chain.at(-1)!.flags & DescriptorFlag.next) === 0) break;
    }
    const writes = ({ flags }: { flags: number }) => (flags & DescriptorFlag.write) !== 0;
    return { head, readable: chain.filter((one) => !writes(one)), writable: chain.filter(writes) };
  }

  /** Gives a chain back, whether or not there is one. */
  complete(id: number, length: number): void {
    const { device, size } = this.place();
    const index = this.dma.readU16(Number(device) + RING.index);
    const at = Number(device) + RING.entries + USED_ELEMENT.size * (index % size);
    this.dma.write(at, USED_ELEMENT.encode({ id, length }));
    this.setUsedIndex(index + 1);
  }

  setUsedIndex(value: number): void {
    this.dma.writeU16(Number(this.place().device) + RING.index, value);
  }
}
