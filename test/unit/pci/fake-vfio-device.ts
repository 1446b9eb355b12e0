import { SystemError } from "../../../src/base/errors.ts";
import { duplicate, type OwnedFd } from "../../../src/native/fd.ts";
import { slowAccess } from "../../../src/native/slow.ts";
import { memfd, pread, pwrite, signalEventfd } from "../../../src/native/sys.ts";
import { parsePciAddress } from "../../../src/pci/address.ts";
import type { BusEntry } from "../../../src/pci/bus.ts";
import type { DeviceCalls } from "../../../src/pci/vfio/device.ts";
import { DeviceRequest, NO_EVENTFD, REGION_CAP_MSIX_MAPPABLE } from "../../../src/pci/vfio/device-uapi.ts";
import {
  DEVICE_INFO,
  DeviceFlag,
  IRQ_INFO,
  IRQ_SET,
  IrqIndex,
  IrqInfoFlag,
  IrqSetFlag,
  REGION_CAP,
  REGION_CAP_SPARSE_MMAP,
  REGION_INFO,
  Region,
  RegionFlag,
  SPARSE_AREA,
  SPARSE_MMAP,
} from "../../../src/vfio-user/messages.ts";

const PAGE = 4096;
/** Regions of the fake: where in its file, how long, and what the kernel says of mapping them. */
export const PLACES = {
  /** I/O ports: not to be mapped. */
  ports: { index: 0, offset: 0, size: 32 },
  /** Only its second page can be mapped. */
  sparse: { index: 1, offset: PAGE, size: 3 * PAGE },
  /** Smaller than a page. */
  small: { index: 2, offset: 4 * PAGE, size: 64 },
  /** Mapped whole; as long as BAR 4 of QEMU's virtio functions. */
  whole: { index: 4, offset: 5 * PAGE, size: 4 * PAGE },
  config: { index: Region.config, offset: 9 * PAGE, size: PAGE },
} as const;
const FILE_SIZE = 10 * PAGE;
const CLASS_REGISTER = 8;
const EINVAL = 22;

export const ENTRY: BusEntry = {
  address: parsePciAddress("0000:5a:00.1"),
  directory: "/nowhere",
  vendor: 0x1af4,
  device: 0x1042,
  class: 0x010000,
  physfn: undefined,
  virtfns: new Map(),
  transport: { kind: "vfio", driver: "vfio-pci", group: 7, cdev: undefined, takesToken: false, numaNode: undefined },
};

/**
 * The kernel's side of a VFIO device, without a kernel: its registers are a memory file, its interrupts are
 * kept by index and vector. `before` is called before each request is carried out, and may fail it or hold it up.
 */
export class FakeVfioDevice implements Disposable {
  /** Given to VfioFunction; this keeps one of its own. */
  readonly fd: OwnedFd;
  private readonly own: OwnedFd;
  /** Eventfds by interrupt index and vector; the key is there where the interrupt is enabled. */
  readonly routes = new Map<string, OwnedFd | undefined>();
  vectors = 4;
  /** Vectors that the machine has left. */
  vectorsLeft = 4;
  canReset = true;
  isExpress = true;
  resets = 0;
  before: (request: number) => Promise<void> | void = () => {};

  constructor() {
    this.fd = memfd("vfio-device", FILE_SIZE);
    this.own = this.fd.dup();
    this.poke(PLACES.config.offset + CLASS_REGISTER, [1, 0, 0, 1]);
  }

  /** Before accesses to its registers are carried out, one call at a time. */
  beforeAccess: () => Promise<void> | void = () => {};
  /** How many accesses each call had, but for the look from time to time whether it answers. */
  readonly accessCalls: number[] = [];

  readonly calls: DeviceCalls = {
    ioctl: (fd, request, argument) => this.ioctl(fd, request, argument),
    access: async (fd, accesses) => {
      using held = duplicate(fd);
      const counted = accesses.filter(({ offset }) => offset !== PLACES.config.offset + CLASS_REGISTER);
      if (counted.length > 0) this.accessCalls.push(counted.length);
      await this.beforeAccess();
      return await slowAccess(held.number, accesses);
    },
  };

  private readonly ioctl: DeviceCalls["ioctl"] = async (_fd, request, argument) => {
    // The thread of a real one has a duplicate.
    using _held = duplicate(_fd);
    await this.before(request);
    if (request === DeviceRequest.reset) {
      this.resets++;
      return 0;
    }
    if (typeof argument === "number") throw new SystemError("ioctl", EINVAL);
    switch (request) {
      case DeviceRequest.getInfo:
        DEVICE_INFO.write(argument, {
          flags: DeviceFlag.pci | (this.canReset ? DeviceFlag.reset : 0),
          regions: 9,
          irqs: 5,
        });
        return 0;
      case DeviceRequest.getRegionInfo:
        return this.regionInfo(argument);
      case DeviceRequest.getIrqInfo:
        return this.irqInfo(argument);
      case DeviceRequest.setIrqs:
        return this.setIrqs(argument);
      default:
        throw new SystemError("ioctl", EINVAL);
    }
  };

  peek(offset: number, length: number): number[] {
    const bytes = new Uint8Array(length);
    pread(this.own.number, bytes, offset);
    return [...bytes];
  }

  poke(offset: number, bytes: readonly number[]): void {
    pwrite(this.own.number, Uint8Array.from(bytes), offset);
  }

  get fileNumber(): number {
    return this.own.number;
  }

  /** The device raises an interrupt. */
  fire(index: number, vector: number): void {
    const to = this.routes.get(`${index}.${vector}`);
    if (to !== undefined) signalEventfd(to.number);
  }

  /** It answers no more: reads are all ones. */
  fallSilent(): void {
    this.poke(PLACES.config.offset + CLASS_REGISTER, [0xff, 0xff, 0xff, 0xff]);
  }

  [Symbol.dispose](): void {
    for (const eventfd of this.routes.values()) eventfd?.[Symbol.dispose]();
    this.routes.clear();
    this.own[Symbol.dispose]();
    this.fd[Symbol.dispose]();
  }

  private regionInfo(argument: Uint8Array): number {
    const { index, argsz } = REGION_INFO.read(argument);
    const place = Object.values(PLACES).find((one) => one.index === index);
    if (place === undefined) {
      REGION_INFO.write(argument, { argsz, index });
      return 0;
    }
    const { offset, size } = place;
    const access = RegionFlag.read | RegionFlag.write;
    if (place === PLACES.ports || place === PLACES.config) {
      REGION_INFO.write(argument, { argsz, index, flags: access, size, offset });
    } else if (place === PLACES.small) {
      REGION_INFO.write(argument, { argsz, index, flags: access | RegionFlag.mmap, size, offset });
    } else {
      this.capabilities(argument, place === PLACES.sparse, { argsz, index, size, offset });
    }
    return 0;
  }

  private capabilities(
    argument: Uint8Array,
    sparse: boolean,
    info: { readonly argsz: number; readonly index: number; readonly size: number; readonly offset: number },
  ): void {
    const flags = RegionFlag.read | RegionFlag.write | RegionFlag.mmap | RegionFlag.caps;
    const capOffset = REGION_INFO.size;
    // The sparse one is said to need more room than there was, the first time.
    const needed = 4096;
    if (sparse && info.argsz < needed) {
      REGION_INFO.write(argument, { ...info, flags, argsz: needed });
      return;
    }
    REGION_INFO.write(argument, { ...info, flags, capOffset });
    if (sparse) {
      const second = capOffset + 16;
      REGION_CAP.write(argument, { id: 99, version: 1, next: second }, capOffset);
      REGION_CAP.write(argument, { id: REGION_CAP_SPARSE_MMAP, version: 1 }, second);
      SPARSE_MMAP.write(argument, { areas: 1 }, second + REGION_CAP.size);
      SPARSE_AREA.write(argument, { offset: PAGE, size: PAGE }, second + REGION_CAP.size + SPARSE_MMAP.size);
    } else {
      REGION_CAP.write(argument, { id: REGION_CAP_MSIX_MAPPABLE, version: 1 }, capOffset);
    }
  }

  private irqInfo(argument: Uint8Array): number {
    const { index, argsz } = IRQ_INFO.read(argument);
    if (index === IrqIndex.error && !this.isExpress) throw new SystemError("ioctl", EINVAL);
    const count = index === IrqIndex.msix ? this.vectors : 1;
    IRQ_INFO.write(argument, { argsz, index, count, flags: IrqInfoFlag.eventfd | IrqInfoFlag.noResize });
    return 0;
  }

  private setIrqs(argument: Uint8Array): number {
    const { argsz, flags, index, start, count } = IRQ_SET.read(argument);
    if (flags !== (IrqSetFlag.dataEventfd | IrqSetFlag.actionTrigger) || argsz !== IRQ_SET.size + 4 * count) {
      throw new SystemError("ioctl", EINVAL);
    }
    const enabled = [...this.routes.keys()].filter((key) => key.startsWith(`${index}.`)).length;
    // As kernels before 6.5: what is not enabled at first never is.
    if (enabled > 0 && start + count > enabled) throw new SystemError("ioctl", EINVAL);
    if (index === IrqIndex.msix && start + count > this.vectorsLeft) return this.vectorsLeft;
    for (const [i, number] of new Int32Array(argument.slice(IRQ_SET.size).buffer).entries()) {
      const key = `${index}.${start + i}`;
      this.routes.get(key)?.[Symbol.dispose]();
      this.routes.set(key, number === NO_EVENTFD ? undefined : duplicate(number));
    }
    return 0;
  }
}
