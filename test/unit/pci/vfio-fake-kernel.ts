import { SystemError } from "../../../src/base/errors.ts";
import type { OwnedFd } from "../../../src/native/fd.ts";
import { fileInfo, memfd } from "../../../src/native/sys.ts";
import * as uapi from "../../../src/pci/vfio/iommu-uapi.ts";

const { Errno } = uapi;
/** Mappings that a container takes. */
export const LIMIT = 20;
const EEXIST = 17;
const ESRCH = 3;
const NAMES = new Map(
  Object.values(uapi)
    .filter((value) => typeof value === "object" && "name" in value && "number" in value)
    .map(({ name, number }) => [number, name]),
);

/** What is mapped at an IOVA. */
interface Mapped {
  readonly size: number;
  /** The process by whose memory the kernel finds the pages; undefined where it was told to forget that. */
  process: number | undefined;
}

interface Space {
  readonly mapped: Map<number, Mapped>;
  /** Groups, or functions that are attached. */
  readonly users: Set<number>;
}

type Call = (file: number, argument: Uint8Array) => number;

/**
 * Containers, groups, iommufds and devices as the kernel has them, for several processes of which one lives at a time; with
 * what was measured of a kernel whose caller has died. Files are told apart by their inodes: duplicates are the same file.
 */
export class FakeKernel {
  /** Mappings that it takes after all. */
  limit = LIMIT;
  /** The one that lives. */
  process = 1;
  /** Requests since it was born. */
  asked: string[] = [];
  /** It dies at this request of its own, before or after it takes effect. */
  death: { readonly at: number; readonly after: boolean } | undefined;
  dead = false;
  private readonly spaces = new Map<number, Space>();
  private readonly spaceOf = new Map<number, number>();

  openFile = async (path: string): Promise<OwnedFd> => {
    const file = memfd("vfio-file", 1);
    if (path === "/dev/vfio/vfio" || path === "/dev/iommu") {
      this.spaces.set(inode(file.number), { mapped: new Map(), users: new Set() });
    }
    return file;
  };

  ioctl = async (fd: number, number: number, argument: Uint8Array): Promise<number> => {
    const name = NAMES.get(number) ?? "";
    if (this.dead) throw new SystemError(name, ESRCH);
    this.asked.push(name);
    const dies = this.asked.length === this.death?.at;
    if (dies) this.dead = true;
    if (dies && this.death?.after !== true) throw new SystemError(name, ESRCH);
    const result = this.calls[name]?.(inode(fd), argument) ?? 0;
    if (dies) throw new SystemError(name, ESRCH);
    return result;
  };

  /** The process dies, and another one lives. */
  next(): void {
    this.process++;
    this.asked = [];
    this.death = undefined;
    this.dead = false;
  }

  /** The last fd of each group was closed. */
  closeGroups(): void {
    for (const { users, mapped } of this.spaces.values()) {
      users.clear();
      mapped.clear();
    }
  }

  /** Of all address spaces: where something is mapped, and how it is found, in the order of its addresses. */
  get mapped(): { iova: number; size: number; process: number | undefined }[] {
    const all = [...this.spaces.values()].flatMap(({ mapped }) => [...mapped]);
    return all.map(([iova, one]) => ({ iova, ...one })).sort((a, b) => a.iova - b.iova);
  }

  private readonly calls: Readonly<Record<string, Call>> = {
    VFIO_CHECK_EXTENSION: () => 1,
    VFIO_GROUP_GET_STATUS: (_, argument) => {
      uapi.GROUP_STATUS.write(argument, { flags: uapi.GROUP_VIABLE });
      return 0;
    },
    VFIO_GROUP_SET_CONTAINER: (group, argument) => {
      const container = inode(new DataView(argument.buffer).getInt32(0, true));
      const { mapped, users } = this.spaces.get(container)!;
      for (const { process } of mapped.values()) {
        if (process === undefined) throw new SystemError("set", Errno.EBUSY);
        if (process !== this.process) throw new SystemError("set", Errno.EFAULT);
      }
      users.add(group);
      this.spaceOf.set(group, container);
      return 0;
    },
    VFIO_IOMMU_GET_INFO: (container, argument) => {
      if (this.spaces.get(container)?.users.size === 0) throw new SystemError("info", Errno.EINVAL);
      writeInfo(argument, LIMIT - this.mapped.length);
      return 0;
    },
    VFIO_GROUP_GET_DEVICE_FD: () => memfd("vfio-device", 1).release(),
    VFIO_IOMMU_MAP_DMA: (container, argument) => {
      const { flags, iova, size } = uapi.TYPE1_DMA_MAP.read(argument);
      if (flags !== uapi.DmaMapFlag.vaddr) return this.map(container, iova, size);
      const there = this.spaces.get(container)!.mapped.get(iova);
      if (there === undefined) throw new SystemError("map", Errno.ENOENT);
      if (there.process !== undefined || there.size !== size) throw new SystemError("map", Errno.EINVAL);
      there.process = this.process;
      return 0;
    },
    VFIO_IOMMU_UNMAP_DMA: (container, argument) => {
      if (this.spaces.get(container)!.users.size === 0) throw new SystemError("unmap", Errno.EINVAL);
      const { flags, iova, size } = uapi.TYPE1_DMA_UNMAP.read(argument);
      const there = this.exactly(container, iova, size, Errno.EINVAL);
      uapi.TYPE1_DMA_UNMAP.write(argument, { size: there?.size ?? 0 });
      if (there === undefined) return 0;
      if (flags !== uapi.DMA_UNMAP_VADDR) this.spaces.get(container)!.mapped.delete(iova);
      else if (there.process === undefined) throw new SystemError("unmap", Errno.EINVAL);
      else there.process = undefined;
      return 0;
    },
    IOMMU_IOAS_ALLOC: (_, argument) => {
      uapi.IOAS_ALLOC.write(argument, { out_ioas_id: 7 });
      return 0;
    },
    VFIO_DEVICE_BIND_IOMMUFD: (device, argument) => {
      this.spaceOf.set(device, inode(uapi.BIND_IOMMUFD.read(argument).iommufd));
      return 0;
    },
    VFIO_DEVICE_ATTACH_IOMMUFD_PT: (device, argument) => {
      if (uapi.ATTACH_PT.read(argument).pt_id !== 7) throw new SystemError("attach", Errno.ENOENT);
      const { mapped, users } = this.spaces.get(this.spaceOf.get(device)!)!;
      const foreign = [...mapped.values()].some(({ process }) => process !== this.process);
      if (users.size === 0 && foreign) throw new SystemError("attach", Errno.EFAULT);
      users.add(device);
      return 0;
    },
    VFIO_DEVICE_DETACH_IOMMUFD_PT: (device) => {
      this.spaces.get(this.spaceOf.get(device)!)!.users.delete(device);
      return 0;
    },
    IOMMU_IOAS_IOVA_RANGES: (_, argument) => {
      uapi.IOAS_IOVA_RANGES.write(argument, { num_iovas: 1, out_iova_alignment: 4096 });
      return 0;
    },
    IOMMU_IOAS_MAP: (file, argument) => {
      const { ioas_id, iova, length } = uapi.IOAS_MAP.read(argument);
      if (ioas_id !== 7) throw new SystemError("map", Errno.ENOENT);
      return this.map(file, iova, length);
    },
    IOMMU_IOAS_UNMAP: (file, argument) => {
      const { iova, length } = uapi.IOAS_UNMAP.read(argument);
      if (this.exactly(file, iova, length, Errno.ENOENT) === undefined) throw new SystemError("unmap", Errno.ENOENT);
      this.spaces.get(file)!.mapped.delete(iova);
      return 0;
    },
  };

  private map(file: number, iova: number, size: number): number {
    const { mapped } = this.spaces.get(file)!;
    const overlaps = [...mapped].some(([start, one]) => start < iova + size && iova < start + one.size);
    if (overlaps) throw new SystemError("map", EEXIST);
    if (mapped.size >= this.limit) throw new SystemError("map", Errno.ENOSPC);
    mapped.set(iova, { size, process: this.process });
    return 0;
  }

  /** @throws SystemError where only a part of something is meant */
  private exactly(file: number, iova: number, size: number, errno: number): Mapped | undefined {
    const { mapped } = this.spaces.get(file)!;
    const cut = [...mapped].some(
      ([start, one]) => start < iova + size && iova < start + one.size && !(start === iova && one.size === size),
    );
    if (cut) throw new SystemError("unmap", errno);
    return mapped.get(iova);
  }
}

function inode(fd: number): number {
  return fileInfo(fd).ino;
}

/** All of 48 bits. @param avail mappings more that it takes */
function writeInfo(argument: Uint8Array, avail: number): void {
  const info = new Uint8Array(80);
  uapi.TYPE1_INFO.write(info, { argsz: info.length, flags: 3, iova_pgsizes: 4096n, cap_offset: 24 });
  uapi.INFO_CAPABILITY.write(info, { id: uapi.Type1Capability.iovaRange, version: 1, next: 60 }, 24);
  uapi.CAP_IOVA_RANGE.write(info, { nr_iovas: 1 }, 24);
  uapi.IOVA_RANGE.write(info, { start: 0n, last: 2n ** 48n - 1n }, 40);
  uapi.INFO_CAPABILITY.write(info, { id: uapi.Type1Capability.dmaAvailable, version: 1, next: 0 }, 60);
  uapi.CAP_DMA_AVAILABLE.write(info, { avail }, 60);
  argument.set(info);
}
