import { dlopen } from "bun:ffi";
import { readdirSync, readlinkSync } from "node:fs";
import { struct } from "../../../src/base/layout.ts";
import { OwnedFd } from "../../../src/native/fd.ts";
import { slowIoctl } from "../../../src/native/slow.ts";

const libc = dlopen("libc.so.6", {
  syscall: { args: ["i64", "i64", "i64", "i64"], returns: "i64" },
  mmap: { args: ["usize", "usize", "i32", "i32", "i32", "i64"], returns: "i64" },
  munmap: { args: ["usize", "usize"], returns: "i32" },
}).symbols;

const SYS_PIDFD_OPEN = 434;
const SYS_PIDFD_GETFD = 438;
const PROT_READ_WRITE = 3;
const MAP_SHARED = 1;

/** linux/vfio.h: VFIO_IOMMU_MAP_DMA, VFIO_IOMMU_UNMAP_DMA. */
const Type1 = { mapDma: 0x3b71, unmapDma: 0x3b72, readWrite: 3 } as const;
const DMA_MAP = struct("vfio_iommu_type1_dma_map", 32, {
  argsz: [0, "u32"],
  flags: [4, "u32"],
  vaddr: [8, "u64"],
  iova: [16, "addr"],
  size: [24, "addr"],
});
const DMA_UNMAP = struct("vfio_iommu_type1_dma_unmap", 24, {
  argsz: [0, "u32"],
  flags: [4, "u32"],
  iova: [8, "addr"],
  size: [16, "addr"],
});
/** linux/iommufd.h: IOMMU_IOAS_MAP, IOMMU_IOAS_UNMAP; flags FIXED_IOVA, WRITEABLE, READABLE. */
const Ioas = { map: 0x3b85, unmap: 0x3b86, fixedReadWrite: 7 } as const;
const IOAS_MAP = struct("iommu_ioas_map", 40, {
  size: [0, "u32"],
  flags: [4, "u32"],
  ioas: [8, "u32"],
  userAddress: [16, "u64"],
  length: [24, "addr"],
  iova: [32, "addr"],
});
const IOAS_UNMAP = struct("iommu_ioas_unmap", 24, {
  size: [0, "u32"],
  ioas: [4, "u32"],
  iova: [8, "addr"],
  length: [16, "addr"],
});
/** An iommufd numbers its objects from 1 on; one with a function or two has few. */
const MOST_IOAS_IDS = 16;

/** Bytes. */
interface IovaRange {
  readonly iova: number;
  readonly size: number;
}

/**
 * The IOMMU address space of another process, by a duplicate of its fd: what is done to it here happens behind the back
 * of that process, as by a broken kernel or a bug of its own.
 */
export class StolenSpace implements Disposable {
  private ioas: number | undefined;

  private constructor(
    private readonly kind: "container" | "iommufd",
    private readonly fd: OwnedFd,
    /** Its fd in the process that it was stolen from. */
    readonly number: number,
  ) {}

  /** Every one that the process has open. @param known fds in that process that are left out */
  static of(pid: number, known: readonly number[] = []): StolenSpace[] {
    using process = owned(libc.syscall(SYS_PIDFD_OPEN, pid, 0, 0), "pidfd_open");
    const found: StolenSpace[] = [];
    for (const number of readdirSync(`/proc/${pid}/fd`)
      .map(Number)
      .sort((a, b) => a - b)) {
      const kind = kindOf(linkOf(pid, number));
      if (kind === undefined || known.includes(number)) continue;
      const fd = owned(libc.syscall(SYS_PIDFD_GETFD, process.number, number, 0), "pidfd_getfd");
      found.push(new StolenSpace(kind, fd, number));
    }
    return found;
  }

  /** Takes away what was mapped as exactly this range. @throws SystemError; Error where nothing was mapped there */
  async unmap({ iova, size }: IovaRange): Promise<void> {
    if (this.kind === "iommufd") return await this.unmapIoas(iova, size);
    const argument = DMA_UNMAP.encode({ argsz: DMA_UNMAP.size, iova, size });
    await slowIoctl(this.fd.number, Type1.unmapDma, argument);
    const unmapped = DMA_UNMAP.read(argument).size;
    if (unmapped !== size) throw new Error(`${unmapped} bytes were unmapped at 0x${iova.toString(16)}, not ${size}`);
  }

  /** Maps the beginning of a file there, once more. @param file borrowed for the call */
  async map({ iova, size }: IovaRange, file: number): Promise<void> {
    const address = libc.mmap(0, size, PROT_READ_WRITE, MAP_SHARED, file, 0);
    if (BigInt(address) < 0n) throw new Error("mmap failed");
    try {
      if (this.kind === "container") {
        const fields = { argsz: DMA_MAP.size, flags: Type1.readWrite, vaddr: BigInt(address), iova, size };
        await slowIoctl(this.fd.number, Type1.mapDma, DMA_MAP.encode(fields));
      } else {
        const fields = { flags: Ioas.fixedReadWrite, ioas: this.ioas ?? 0, userAddress: BigInt(address) };
        const argument = IOAS_MAP.encode({ size: IOAS_MAP.size, ...fields, length: size, iova });
        await slowIoctl(this.fd.number, Ioas.map, argument);
      }
    } finally {
      // What is pinned stays so.
      libc.munmap(Number(address), size);
    }
  }

  [Symbol.dispose](): void {
    this.fd[Symbol.dispose]();
  }

  private async unmapIoas(iova: number, length: number): Promise<void> {
    let failure: unknown;
    for (let ioas = 1; ioas <= MOST_IOAS_IDS; ioas++) {
      try {
        const argument = IOAS_UNMAP.encode({ size: IOAS_UNMAP.size, ioas, iova, length });
        await slowIoctl(this.fd.number, Ioas.unmap, argument);
        this.ioas = ioas;
        return;
      } catch (error) {
        failure = error;
      }
    }
    throw failure;
  }
}

function kindOf(link: string): "container" | "iommufd" | undefined {
  if (link === "/dev/vfio/vfio") return "container";
  return link === "/dev/iommu" ? "iommufd" : undefined;
}

function linkOf(pid: number, fd: number): string {
  try {
    return readlinkSync(`/proc/${pid}/fd/${fd}`);
  } catch {
    // Closed meanwhile.
    return "";
  }
}

function owned(result: number | bigint, call: string): OwnedFd {
  if (Number(result) < 0) throw new Error(`${call} failed`);
  return new OwnedFd(Number(result));
}
