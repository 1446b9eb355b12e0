import { SystemError } from "../../base/errors.ts";
import { struct } from "../../base/layout.ts";
import { slowIoctl } from "../../native/slow.ts";

/**
 * What the kernel takes and answers about groups, containers and I/O address spaces: linux/vfio.h and
 * linux/iommufd.h, whose names these are. Both kinds of requests are _IO(';', number), without a size.
 */

interface Request {
  readonly name: string;
  readonly number: number;
}

const TYPE = 0x3b;
const VFIO_BASE = 100;

function vfio(name: string, offset: number): Request {
  return { name, number: (TYPE << 8) | (VFIO_BASE + offset) };
}

function iommu(name: string, number: number): Request {
  return { name, number: (TYPE << 8) | number };
}

export const VFIO_GET_API_VERSION = vfio("VFIO_GET_API_VERSION", 0);
export const VFIO_CHECK_EXTENSION = vfio("VFIO_CHECK_EXTENSION", 1);
export const VFIO_SET_IOMMU = vfio("VFIO_SET_IOMMU", 2);
export const VFIO_GROUP_GET_STATUS = vfio("VFIO_GROUP_GET_STATUS", 3);
export const VFIO_GROUP_SET_CONTAINER = vfio("VFIO_GROUP_SET_CONTAINER", 4);
export const VFIO_GROUP_GET_DEVICE_FD = vfio("VFIO_GROUP_GET_DEVICE_FD", 6);
export const VFIO_IOMMU_GET_INFO = vfio("VFIO_IOMMU_GET_INFO", 12);
export const VFIO_IOMMU_MAP_DMA = vfio("VFIO_IOMMU_MAP_DMA", 13);
export const VFIO_IOMMU_UNMAP_DMA = vfio("VFIO_IOMMU_UNMAP_DMA", 14);
export const VFIO_DEVICE_BIND_IOMMUFD = vfio("VFIO_DEVICE_BIND_IOMMUFD", 18);
export const VFIO_DEVICE_ATTACH_IOMMUFD_PT = vfio("VFIO_DEVICE_ATTACH_IOMMUFD_PT", 19);
export const VFIO_DEVICE_DETACH_IOMMUFD_PT = vfio("VFIO_DEVICE_DETACH_IOMMUFD_PT", 20);
export const IOMMU_IOAS_ALLOC = iommu("IOMMU_IOAS_ALLOC", 0x81);
export const IOMMU_IOAS_IOVA_RANGES = iommu("IOMMU_IOAS_IOVA_RANGES", 0x84);
export const IOMMU_IOAS_MAP = iommu("IOMMU_IOAS_MAP", 0x85);
export const IOMMU_IOAS_UNMAP = iommu("IOMMU_IOAS_UNMAP", 0x86);

export const VFIO_API_VERSION = 0;
export const VFIO_TYPE1V2_IOMMU = 3;

export const GROUP_STATUS = struct("vfio_group_status", 8, { argsz: [0, "u32"], flags: [4, "u32"] });
export const GROUP_VIABLE = 1;

/** `cap_offset` is where the first capability begins, 0 where there is none. */
export const TYPE1_INFO = struct("vfio_iommu_type1_info", 24, {
  argsz: [0, "u32"],
  flags: [4, "u32"],
  iova_pgsizes: [8, "u64"],
  cap_offset: [16, "u32"],
});
export const Type1InfoFlag = { pageSizes: 1, capabilities: 2 } as const;

/** `next` is where the following one begins, counted from the begin of the whole answer; 0 in the last. */
export const INFO_CAPABILITY = struct("vfio_info_cap_header", 8, {
  id: [0, "u16"],
  version: [2, "u16"],
  next: [4, "u32"],
});
export const Type1Capability = { iovaRange: 1, dmaAvailable: 3 } as const;
/** Followed by as many IOVA_RANGEs. */
export const CAP_IOVA_RANGE = struct("vfio_iommu_type1_info_cap_iova_range", 16, { nr_iovas: [8, "u32"] });
export const CAP_DMA_AVAILABLE = struct("vfio_iommu_type1_info_dma_avail", 12, { avail: [8, "u32"] });
/** The same in both interfaces; the end is inclusive. */
export const IOVA_RANGE = struct("vfio_iova_range", 16, { start: [0, "u64"], last: [8, "u64"] });

export const TYPE1_DMA_MAP = struct("vfio_iommu_type1_dma_map", 32, {
  argsz: [0, "u32"],
  flags: [4, "u32"],
  vaddr: [8, "addr"],
  iova: [16, "addr"],
  size: [24, "addr"],
});
/** `vaddr` alone: what is mapped already is found at another address from now on, which may be another process's. */
export const DmaMapFlag = { read: 1, write: 2, vaddr: 4 } as const;

/** The kernel writes back how much it has unmapped. */
export const TYPE1_DMA_UNMAP = struct("vfio_iommu_type1_dma_unmap", 24, {
  argsz: [0, "u32"],
  flags: [4, "u32"],
  iova: [8, "addr"],
  size: [16, "addr"],
});
/** Nothing is unmapped: the kernel forgets at which address it found the memory. */
export const DMA_UNMAP_VADDR = 4;

/** `token_uuid_ptr` since 6.17; before 6.18.3 the kernel answers E2BIG where it is not 0. */
export const BIND_IOMMUFD = struct("vfio_device_bind_iommufd", 24, {
  argsz: [0, "u32"],
  flags: [4, "u32"],
  iommufd: [8, "u32"],
  out_devid: [12, "u32"],
  token_uuid_ptr: [16, "addr"],
});
/** Bytes of BIND_IOMMUFD that every kernel knows. */
export const BIND_IOMMUFD_BASE = 16;
export const BIND_FLAG_TOKEN = 1;

export const ATTACH_PT = struct("vfio_device_attach_iommufd_pt", 12, {
  argsz: [0, "u32"],
  flags: [4, "u32"],
  pt_id: [8, "u32"],
});
export const DETACH_PT = struct("vfio_device_detach_iommufd_pt", 8, { argsz: [0, "u32"], flags: [4, "u32"] });

export const IOAS_ALLOC = struct("iommu_ioas_alloc", 12, {
  size: [0, "u32"],
  flags: [4, "u32"],
  out_ioas_id: [8, "u32"],
});
/** `allowed_iovas` points to `num_iovas` IOVA_RANGEs; their real count is written back. */
export const IOAS_IOVA_RANGES = struct("iommu_ioas_iova_ranges", 32, {
  size: [0, "u32"],
  ioas_id: [4, "u32"],
  num_iovas: [8, "u32"],
  allowed_iovas: [16, "addr"],
  out_iova_alignment: [24, "addr"],
});
export const IOAS_MAP = struct("iommu_ioas_map", 40, {
  size: [0, "u32"],
  flags: [4, "u32"],
  ioas_id: [8, "u32"],
  user_va: [16, "addr"],
  length: [24, "addr"],
  iova: [32, "addr"],
});
export const IoasMapFlag = { fixedIova: 1, writeable: 2, readable: 4 } as const;
/** The kernel writes back how much it has unmapped. */
export const IOAS_UNMAP = struct("iommu_ioas_unmap", 24, {
  size: [0, "u32"],
  ioas_id: [4, "u32"],
  iova: [8, "addr"],
  length: [16, "addr"],
});

/** The errno values that have a meaning of their own here. */
export const Errno = {
  EPERM: 1,
  ENOENT: 2,
  ENXIO: 6,
  E2BIG: 7,
  EAGAIN: 11,
  ENOMEM: 12,
  EACCES: 13,
  EFAULT: 14,
  EBUSY: 16,
  ENODEV: 19,
  EINVAL: 22,
  ENOSPC: 28,
  EMSGSIZE: 90,
  EADDRINUSE: 98,
} as const;

/**
 * Makes one request, on a thread of its own.
 * @param fd borrowed for the call
 * @param argument written by the kernel too; a number is passed by value
 * @throws SystemError that names the request
 */
export async function request(fd: number, { name, number }: Request, argument: Uint8Array | number): Promise<number> {
  try {
    return await slowIoctl(fd, number, argument);
  } catch (error) {
    throw error instanceof SystemError ? new SystemError(name, error.errno) : error;
  }
}

/** Whether the error is a system call's with one of these errno values. */
export function failedWith(error: unknown, ...errnos: readonly number[]): boolean {
  return error instanceof SystemError && errnos.includes(error.errno);
}
