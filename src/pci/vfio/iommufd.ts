import type { Deadline } from "../../base/deadline.ts";
import { VhostdError } from "../../base/errors.ts";
import type { OwnedFd } from "../../native/fd.ts";
import { slowClose } from "../../native/slow.ts";
import type { Iommu, IommuSnapshot, KernelEntry, OpenedDevice } from "./iommu.ts";
import {
  ATTACH_PT,
  BIND_FLAG_TOKEN,
  BIND_IOMMUFD,
  BIND_IOMMUFD_BASE,
  DETACH_PT,
  Errno,
  failedWith,
  IOAS_ALLOC,
  IOAS_IOVA_RANGES,
  IOAS_MAP,
  IOAS_UNMAP,
  IOMMU_IOAS_ALLOC,
  IOMMU_IOAS_IOVA_RANGES,
  IOMMU_IOAS_MAP,
  IOMMU_IOAS_UNMAP,
  IOVA_RANGE,
  IoasMapFlag,
  request,
  VFIO_DEVICE_ATTACH_IOMMUFD_PT,
  VFIO_DEVICE_BIND_IOMMUFD,
  VFIO_DEVICE_DETACH_IOMMUFD_PT,
} from "./iommu-uapi.ts";
import { type IovaRange, parseIovaRanges } from "./iova-ranges.ts";
import { KernelCalls } from "./kernel-calls.ts";
import { checkUsable, ignore, openFileOf, tokenError, whileBusy } from "./opening.ts";
import { IOMMUFD_FD, type TakeFd } from "./record.ts";
import { StableMemory } from "./stable-memory.ts";

/** There where the kernel has iommufd. */
export const IOMMUFD_FILE = "/dev/iommu";
const NO_IOMMUFD =
  'use a kernel with CONFIG_IOMMUFD and CONFIG_VFIO_DEVICE_CDEV, or vfio = "group" in the configuration';
/** Ranges that the first question has room for; the kernel tells when there are more. */
const RANGES = 256;
const RANGES_MAX = 1 << 16;

/** The kernel takes no vf-token with a function's own file; it does with the group's. */
export class TokenNotTaken extends VhostdError {
  constructor({ address }: KernelEntry, cause: unknown) {
    super("notSupported", `the kernel takes no vf-token for ${address} over iommufd`, {
      fix: 'use Linux 6.19, or 6.18 with its stable fixes, or vfio = "group" in the configuration',
      cause,
    });
  }
}

/** An I/O address space of an iommufd of its own. A function that is open reaches nothing before it is attached. */
export class IoAddressSpace implements Iommu {
  readonly kind = "iommufd";
  ranges: readonly IovaRange[] = [];
  pageSize = 4096;
  /** Only memory limits them. */
  readonly mappingLimit = undefined;
  private used = false;

  private constructor(
    private readonly fd: OwnedFd,
    private readonly id: number,
    private readonly calls: KernelCalls,
    private readonly replaceable: boolean,
  ) {}

  /**
   * @param replaceable the group serves instead where a token is not taken: that is said at once
   * @throws VhostdError iommuContainer
   */
  static async make(deadline: Deadline, replaceable: boolean): Promise<IoAddressSpace> {
    const calls = new KernelCalls();
    await using undo = new AsyncDisposableStack();
    const fd = await openFileOf(IOMMUFD_FILE, calls, deadline, NO_IOMMUFD);
    undo.defer(() => slowClose(fd));
    const argument = IOAS_ALLOC.encode({ size: IOAS_ALLOC.size });
    await calls.run(deadline, () => request(fd.number, IOMMU_IOAS_ALLOC, argument), ignore);
    undo.move();
    return new IoAddressSpace(fd, IOAS_ALLOC.read(argument).out_ioas_id, calls, replaceable);
  }

  /**
   * Goes on with one as another process left it.
   * @throws what `take` does
   */
  static revive(ioas: number, take: TakeFd): IoAddressSpace {
    const space = new IoAddressSpace(take(IOMMUFD_FD), ioas, new KernelCalls(), false);
    space.used = true;
    return space;
  }

  snapshot(): IommuSnapshot {
    return { data: { interface: this.kind, ioas: this.id }, fds: new Map([[IOMMUFD_FD, this.fd.number]]) };
  }

  /** A function names the address space, not the other way round. */
  adopt(): () => void {
    return ignore;
  }

  async refresh(deadline: Deadline): Promise<void> {
    await this.calls.run(deadline, () => this.readRanges(), ignore);
  }

  async open(entry: KernelEntry, token: () => Promise<string>, deadline: Deadline): Promise<OpenedDevice> {
    checkUsable(entry);
    const { cdev, takesToken } = entry.transport;
    if (cdev === undefined) {
      throw new VhostdError("iommuContainer", `${entry.address} has no file under /dev/vfio/devices`, {
        fix: NO_IOMMUFD,
      });
    }
    const uuid = takesToken ? uuidBytes(await token()) : undefined;
    // EPERM where another has the group, EINVAL where another has the function still, or where a token is not taken.
    const busy: number[] = [Errno.EBUSY, Errno.EPERM, Errno.EAGAIN];
    if (uuid === undefined || !this.mayBeReplaced) busy.push(Errno.EINVAL);
    const notTaken = (cause: unknown) =>
      uuid !== undefined && failedWith(cause, Errno.EINVAL, Errno.E2BIG) ? new TokenNotTaken(entry, cause) : undefined;
    const attempt = async () => {
      await using undo = new AsyncDisposableStack();
      const fd = await openFileOf(`/dev/vfio/devices/${cdev}`, this.calls, deadline);
      undo.defer(() => slowClose(fd));
      await this.calls.run(deadline, () => this.bind(fd.number, uuid), ignore);
      undo.move();
      return fd;
    };
    const device = await whileBusy(entry, busy, deadline, attempt, notTaken).catch((error) => {
      if (failedWith(error, Errno.EACCES)) throw tokenError(entry, error);
      throw notTaken(error) ?? error;
    });
    this.used = true;
    return { device, leave: ignore };
  }

  async attach(entry: KernelEntry, device: number, deadline: Deadline): Promise<void> {
    const argument = ATTACH_PT.encode({ argsz: ATTACH_PT.size, pt_id: this.id });
    const attached = () => request(device, VFIO_DEVICE_ATTACH_IOMMUFD_PT, argument);
    try {
      await this.calls.run(deadline, attached, () => this.detachNow(device).catch(ignore));
    } catch (error) {
      throw attachError(entry, error);
    }
    try {
      await this.calls.run(deadline, () => this.readRanges(), ignore);
    } catch (error) {
      const detached = this.detachNow(device).catch(ignore);
      this.calls.track(detached);
      await deadline.race(detached).catch(ignore);
      throw error;
    }
  }

  async detach(device: number, deadline: Deadline): Promise<void> {
    await this.calls.run(deadline, () => this.detachNow(device), ignore);
  }

  async map(iova: number, size: number, address: number): Promise<void> {
    const flags = IoasMapFlag.fixedIova | IoasMapFlag.readable | IoasMapFlag.writeable;
    const place = { ioas_id: this.id, user_va: address, length: size, iova };
    await request(this.fd.number, IOMMU_IOAS_MAP, IOAS_MAP.encode({ size: IOAS_MAP.size, flags, ...place }));
  }

  async unmap(iova: number, size: number): Promise<number> {
    const argument = IOAS_UNMAP.encode({ size: IOAS_UNMAP.size, ioas_id: this.id, iova, length: size });
    try {
      await request(this.fd.number, IOMMU_IOAS_UNMAP, argument);
    } catch (error) {
      if (failedWith(error, Errno.ENOENT)) return 0;
      throw error;
    }
    return IOAS_UNMAP.read(argument).length;
  }

  async close(): Promise<void> {
    await this.calls.idle();
    await slowClose(this.fd);
  }

  /** Another address space can serve the function: nothing is open in this one. */
  private get mayBeReplaced(): boolean {
    return this.replaceable && !this.used;
  }

  /** The kernel resets the function meanwhile. */
  private async bind(device: number, uuid: Uint8Array | undefined): Promise<void> {
    using memory = uuid === undefined ? undefined : new StableMemory(uuid.length);
    if (uuid !== undefined) memory?.write(uuid);
    const argument = BIND_IOMMUFD.encode({
      // Kernels that know no token want no more than they know to be other than 0.
      argsz: memory === undefined ? BIND_IOMMUFD_BASE : BIND_IOMMUFD.size,
      flags: memory === undefined ? 0 : BIND_FLAG_TOKEN,
      iommufd: this.fd.number,
      token_uuid_ptr: memory?.address ?? 0,
    });
    await request(device, VFIO_DEVICE_BIND_IOMMUFD, argument);
  }

  private async detachNow(device: number): Promise<void> {
    await request(device, VFIO_DEVICE_DETACH_IOMMUFD_PT, DETACH_PT.encode({ argsz: DETACH_PT.size }));
  }

  /** Which addresses can be mapped depends on all functions that are attached. */
  private async readRanges(): Promise<void> {
    for (let room = RANGES; ; ) {
      using memory = new StableMemory(room * IOVA_RANGE.size);
      const place = { ioas_id: this.id, num_iovas: room, allowed_iovas: memory.address };
      const argument = IOAS_IOVA_RANGES.encode({ size: IOAS_IOVA_RANGES.size, ...place });
      try {
        await request(this.fd.number, IOMMU_IOAS_IOVA_RANGES, argument);
      } catch (error) {
        room = IOAS_IOVA_RANGES.read(argument).num_iovas;
        if (!failedWith(error, Errno.EMSGSIZE) || room > RANGES_MAX) throw error;
        continue;
      }
      const { num_iovas, out_iova_alignment } = IOAS_IOVA_RANGES.read(argument);
      this.ranges = parseIovaRanges(memory.read(), 0, num_iovas);
      this.pageSize = Math.max(4096, out_iova_alignment);
      return;
    }
  }
}

/** @throws VhostdError invalid */
function uuidBytes(uuid: string): Uint8Array {
  const digits = uuid.replaceAll("-", "");
  if (!/^[0-9a-f]{32}$/i.test(digits)) throw new VhostdError("invalid", "the vf-token is no UUID");
  return Uint8Array.fromHex(digits);
}

function attachError({ address, directory }: KernelEntry, cause: unknown): unknown {
  if (failedWith(cause, Errno.EADDRINUSE, Errno.EINVAL)) {
    return new VhostdError(
      "iommuDomain",
      `the IOMMU of ${address} cannot map what the VM's other functions have mapped`,
      {
        fix: `see ${directory}/iommu_group/reserved_regions, and move the guest's memory around them`,
        cause,
      },
    );
  }
  if (failedWith(cause, Errno.EFAULT)) {
    return new VhostdError(
      "iommuDomain",
      `the IOMMU of ${address} cannot map what an earlier process has mapped for the VM's other functions`,
      { fix: "remove the VFs of this VM, and add them again", cause },
    );
  }
  return cause;
}
