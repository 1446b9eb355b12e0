import { SystemError, VhostdError } from "../../base/errors.ts";
import type { StructValue } from "../../base/layout.ts";
import { quickIoctl, slowAccess, slowIoctl } from "../../native/slow.ts";
import {
  DEVICE_INFO,
  DeviceFlag,
  IRQ_INFO,
  IRQ_SET,
  IrqInfoFlag,
  IrqSetFlag,
  REGION_CAP,
  REGION_CAP_SPARSE_MMAP,
  REGION_INFO,
  Region,
  RegionFlag,
  SPARSE_AREA,
  SPARSE_MMAP,
} from "../../vfio-user/messages.ts";
import { DeviceRequest, REGION_CAP_MSIX_MAPPABLE } from "./device-uapi.ts";

/** What is asked of the fd of a device, or what stands in for the kernel in tests. */
export interface DeviceCalls {
  readonly ioctl: typeof slowIoctl;
  readonly access: typeof slowAccess;
}

export const KERNEL_CALLS: DeviceCalls = { ioctl: kernelIoctl, access: slowAccess };

/** What the kernel answers of itself. All else may make it wait for the device. */
const QUESTIONS: ReadonlySet<number> = new Set([
  DeviceRequest.getInfo,
  DeviceRequest.getRegionInfo,
  DeviceRequest.getIrqInfo,
]);

async function kernelIoctl(fd: number, request: number, argument: Uint8Array | number): Promise<number> {
  if (QUESTIONS.has(request) && typeof argument !== "number") return quickIoctl(fd, request, argument);
  return await slowIoctl(fd, request, argument);
}

/** Bytes of a region that can be mapped. */
export type MappableArea = { readonly offset: number; readonly size: number };

/** One region; plain data. */
export type RegionPlace = {
  /** Bytes; 0 where the device has no such region. */
  readonly size: number;
  /** Where in the file of the device it begins. */
  readonly fileOffset: number;
  readonly areas: readonly MappableArea[];
};

/** Room for a region's capabilities at first; the kernel says when it needs more. */
const REGION_ROOM = 1024;
const REGION_ROOM_MAX = 64 * 1024;
/** MSI-X table size (PCI 3.0, 6.8.2.3). */
const VECTORS_MAX = 2048;
const EINVAL = 22;

/** The questions and orders that the fd of a VFIO device takes, orders off the JavaScript thread. The fd is borrowed. */
export class VfioDevice {
  constructor(
    private readonly fd: () => number,
    readonly name: string,
    private readonly ioctl: DeviceCalls["ioctl"],
  ) {}

  /** @throws VhostdError notSupported where it is no PCI device */
  async info(): Promise<{ readonly canReset: boolean }> {
    const argument = DEVICE_INFO.encode({ argsz: DEVICE_INFO.size });
    await this.order("VFIO_DEVICE_GET_INFO", DeviceRequest.getInfo, argument);
    const { flags, regions } = DEVICE_INFO.read(argument);
    if ((flags & DeviceFlag.pci) === 0 || regions <= Region.config) {
      throw new VhostdError(
        "notSupported",
        `${this.name} is no PCI device for VFIO: flags ${flags}, ${regions} regions`,
      );
    }
    return { canReset: (flags & DeviceFlag.reset) !== 0 };
  }

  async region(index: number, room = REGION_ROOM): Promise<RegionPlace> {
    const argument = new Uint8Array(room);
    REGION_INFO.write(argument, { argsz: room, index });
    await this.order("VFIO_DEVICE_GET_REGION_INFO", DeviceRequest.getRegionInfo, argument);
    const info = REGION_INFO.read(argument);
    if (info.argsz > room) {
      if (info.argsz > REGION_ROOM_MAX) throw this.senseless(`region ${index} needs ${info.argsz} bytes to describe`);
      return this.region(index, info.argsz);
    }
    const { size, offset: fileOffset } = info;
    const mappable = size > 0 && (info.flags & RegionFlag.mmap) !== 0;
    return { size, fileOffset, areas: mappable ? this.areas(argument, info) : [] };
  }

  /** How many interrupts of a kind there are; 0 where the device has none that signal eventfds. */
  async interrupts(index: number): Promise<number> {
    const argument = IRQ_INFO.encode({ argsz: IRQ_INFO.size, index });
    try {
      await this.order("VFIO_DEVICE_GET_IRQ_INFO", DeviceRequest.getIrqInfo, argument);
    } catch (error) {
      // The error interrupt of a function that is not PCI Express.
      if (errnoOf(error) === EINVAL) return 0;
      throw error;
    }
    const { flags, count } = IRQ_INFO.read(argument);
    if (count > VECTORS_MAX) throw this.senseless(`${count} interrupts of kind ${index}; at most ${VECTORS_MAX}`);
    return (flags & IrqInfoFlag.eventfd) === 0 ? 0 : count;
  }

  /**
   * Interrupts from `start` on signal these eventfds, which are borrowed for the call; those beside them are as before.
   * @returns 0, or how many interrupts could be had where there are not enough: nothing has changed then
   */
  async setEventfds(index: number, start: number, eventfds: readonly number[]): Promise<number> {
    const argument = new Uint8Array(IRQ_SET.size + 4 * eventfds.length);
    IRQ_SET.write(argument, {
      argsz: argument.length,
      flags: IrqSetFlag.dataEventfd | IrqSetFlag.actionTrigger,
      index,
      start,
      count: eventfds.length,
    });
    new Int32Array(argument.buffer, IRQ_SET.size).set(eventfds);
    return await this.order("VFIO_DEVICE_SET_IRQS", DeviceRequest.setIrqs, argument);
  }

  /** @throws SystemError, EAGAIN where somebody else has the device locked at this moment */
  async reset(): Promise<void> {
    await this.order("VFIO_DEVICE_RESET", DeviceRequest.reset, 0);
  }

  private areas(argument: Uint8Array, info: StructValue<typeof REGION_INFO.fields>): MappableArea[] {
    const whole = [{ offset: 0, size: info.size }];
    let at = (info.flags & RegionFlag.caps) === 0 ? 0 : info.capOffset;
    while (at !== 0) {
      if (at < REGION_INFO.size || at + REGION_CAP.size > argument.length) throw this.senseless(`capability at ${at}`);
      const { id, next } = REGION_CAP.read(argument, at);
      if (id === REGION_CAP_MSIX_MAPPABLE) return whole;
      if (id === REGION_CAP_SPARSE_MMAP) return this.sparse(argument, at + REGION_CAP.size, info.size);
      // Ascending only, so that no list goes round in a circle.
      if (next !== 0 && next <= at) throw this.senseless(`capability at ${at} points back to ${next}`);
      at = next;
    }
    return whole;
  }

  private sparse(argument: Uint8Array, at: number, regionSize: number): MappableArea[] {
    const room = argument.length - at - SPARSE_MMAP.size;
    const count = room < 0 ? 0 : SPARSE_MMAP.read(argument, at).areas;
    if (room < count * SPARSE_AREA.size) throw this.senseless(`${count} mappable areas in ${room} bytes`);
    const first = at + SPARSE_MMAP.size;
    const areas = Array.from({ length: count }, (_, i) => SPARSE_AREA.read(argument, first + i * SPARSE_AREA.size));
    const outside = areas.find(({ offset, size }) => size === 0 || offset + size > regionSize);
    if (outside !== undefined) throw this.senseless(`${outside.size} bytes at ${outside.offset} of ${regionSize}`);
    return areas;
  }

  private async order(call: string, request: number, argument: Uint8Array | number): Promise<number> {
    try {
      return await this.ioctl(this.fd(), request, argument);
    } catch (error) {
      const errno = errnoOf(error);
      if (errno === undefined) throw error;
      throw new SystemError(`${call} of ${this.name}`, errno, { cause: error });
    }
  }

  private senseless(what: string): VhostdError {
    return new VhostdError("protocol", `the kernel's description of ${this.name} makes no sense: ${what}`);
  }
}

/** undefined where it is no failed system call. */
export function errnoOf(error: unknown): number | undefined {
  return error instanceof SystemError ? error.errno : undefined;
}
