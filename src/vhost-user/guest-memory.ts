import { asError, type ErrorDetails, VhostdError } from "../base/errors.ts";
import type { OwnedFd } from "../native/fd.ts";
import { slowClose } from "../native/slow.ts";
import { type FileInfo, fileInfo, pread } from "../native/sys.ts";
import type { DmaRange } from "../pci/address-space.ts";
import type { RingMemory } from "../virtio/split-ring.ts";
import type { MEMORY_REGION, PayloadOf } from "./messages.ts";
import { MemoryRefusal } from "./refusal.ts";

/** A region as the front-end describes it. Bytes; `userAddress` is in the front-end's own address space. */
export type RegionDescription = PayloadOf<typeof MEMORY_REGION>;

/** What guest memory needs of its device: DMA mappings. */
export interface DmaMapper {
  mapMemory(range: DmaRange, fd: number): Promise<void>;
  unmapMemory(range: DmaRange): Promise<void>;
}

/** A region that the device can reach. */
export interface Region {
  readonly range: DmaRange;
  readonly userAddress: number;
  readonly fd: OwnedFd;
}

/** The unit of guest memory that an IOMMU maps. On hugetlbfs too: a region may begin inside a huge page. */
const PAGE = 4096;
/** Guest-physical and front-end addresses end here (52 and 57 bits on x86-64; both fit a safe integer). */
const GUEST_ADDRESS_END = 2 ** 52;
/**
 * Closing the last fd of a file of this size frees its pages for long enough to be felt: the front-end is made to wait
 * for it. Bytes.
 */
const BIG_FILE = 64 << 20;
/** As many as a front-end that says everything once for each pair of queues has removed before it is the next pair's turn. */
const REMOVED_KEPT = 32;

/**
 * The memory of the guest, as regions of files. Each region is mapped for DMA before it counts and unmapped before
 * its fd is closed; what stays in a new table is not touched.
 */
export class GuestMemory implements RingMemory {
  /** An earlier process had it, and may have let go of it after its last record. */
  private inherited: boolean;

  /**
   * @param regions that an earlier process had mapped
   * @param lastRemoved those that were removed one by one before
   */
  constructor(
    private readonly mapper: DmaMapper,
    private regions: readonly Region[] = [],
    private lastRemoved: readonly RegionDescription[] = [],
  ) {
    this.inherited = regions.length > 0;
  }

  /** The last regions that were removed one by one, as the front-end described them. */
  get removed(): readonly RegionDescription[] {
    return this.lastRemoved;
  }

  get list(): readonly Region[] {
    return this.regions;
  }

  /** Guest-physical, exclusive; 0 where there is none. */
  get end(): number {
    return this.regions.reduce((end, { range }) => Math.max(end, range.iova + range.size), 0);
  }

  /**
   * SET_MEM_TABLE: changes what is mapped by difference. Takes ownership of `fds`, one a region.
   * @param survives is asked before anything changes whether the new table is acceptable to running rings
   * @throws VhostdError protocol where a region is refused
   */
  async replace(
    table: readonly RegionDescription[],
    fds: OwnedFd[],
    survives: (regions: readonly Region[]) => void,
  ): Promise<void> {
    const wanted: Region[] = [];
    try {
      for (const [index, description] of table.entries()) {
        const fd = fds[index]!;
        wanted.push({ range: checkRegion(description, fd, wanted), userAddress: description.userAddress, fd });
      }
      survives(wanted);
    } catch (error) {
      await closeAll(fds);
      throw error;
    }
    const stays = (region: Region, among: readonly Region[]) => among.some((other) => sameRange(region, other));
    const before = this.regions;
    const toMap = wanted.filter((region) => !stays(region, before));
    try {
      for (const region of before) if (!stays(region, wanted)) await this.unmap(region);
      for (const region of toMap) await this.map(region);
    } catch (error) {
      await closeAll(wanted.filter((region) => !this.regions.includes(region)).map((region) => region.fd));
      throw error;
    }
    const replaced = this.regions.filter((region) => !toMap.includes(region));
    this.regions = wanted;
    await closeAll(replaced.map((region) => region.fd));
  }

  /**
   * Before the device is to use it: what an earlier process had mapped is mapped, which changes nothing where it is. Not
   * sooner: that process may have died while a message took other memory into its place, which is handled again first.
   * @throws VhostdError where the device cannot reach it
   */
  async ensureMapped(): Promise<void> {
    if (!this.inherited) return;
    for (const { range, fd } of this.regions) await this.mapper.mapMemory(range, fd.number);
    this.inherited = false;
  }

  /** Whether the region is one that is here, of the same file. */
  has(description: RegionDescription, fd: OwnedFd): boolean {
    const { dev, ino } = fileInfo(fd.number);
    return this.regions.some(
      (region) =>
        describes(description, region) &&
        region.range.offset === description.fileOffset &&
        region.range.file.dev === dev &&
        region.range.file.ino === ino,
    );
  }

  /** Whether the region was here until it was removed, and nothing is in its place. */
  hasRemoved(description: RegionDescription): boolean {
    if (this.regions.some((region) => describes(description, region))) return false;
    const { guestAddress, size, userAddress } = description;
    return this.removed.some(
      (other) => other.guestAddress === guestAddress && other.size === size && other.userAddress === userAddress,
    );
  }

  /** ADD_MEM_REG. Takes ownership of `fd`. @throws VhostdError protocol where the region is refused */
  async add(description: RegionDescription, fd: OwnedFd): Promise<void> {
    try {
      const range = checkRegion(description, fd, this.regions);
      await this.map({ range, userAddress: description.userAddress, fd });
    } catch (error) {
      await closeFile(fd);
      throw error;
    }
  }

  /** The region that REM_MEM_REG names. @throws VhostdError protocol where there is none */
  find(description: RegionDescription): Region {
    const region = this.regions.find((candidate) => describes(description, candidate));
    if (region !== undefined) return region;
    const { guestAddress, size, userAddress } = description;
    throw new VhostdError(
      "protocol",
      `no memory region of ${hex(size)} bytes at ${hex(guestAddress)} (user address ${hex(userAddress)}) is known, ` +
        `there are ${this.regions.length}`,
    );
  }

  /** REM_MEM_REG. */
  async remove(region: Region): Promise<void> {
    await this.unmap(region);
    const { range, userAddress } = region;
    const description = { guestAddress: range.iova, size: range.size, userAddress, fileOffset: range.offset };
    this.lastRemoved = [description, ...this.lastRemoved].slice(0, REMOVED_KEPT);
  }

  /**
   * Unmaps and closes everything. An unmap that fails keeps nothing else from being unmapped.
   * @returns what failed
   */
  async clear(): Promise<unknown[]> {
    const failures: unknown[] = [];
    for (const region of this.regions) {
      try {
        await this.mapper.unmapMemory(region.range);
      } catch (error) {
        failures.push(error);
      }
    }
    await this.abandon();
    return failures;
  }

  /** Closes the fds and unmaps nothing. */
  async abandon(): Promise<void> {
    const regions = this.regions;
    this.regions = [];
    await closeAll(regions.map((region) => region.fd));
  }

  /**
   * A front-end address as a guest-physical one.
   * @throws VhostdError protocol where `size` bytes from there are not wholly inside one region
   */
  translate(userAddress: number, size: number, what: string): number {
    const region = this.regions.find(
      ({ userAddress: start, range }) => userAddress >= start && userAddress + size <= start + range.size,
    );
    if (region !== undefined) return region.range.iova + (userAddress - region.userAddress);
    const spans = this.regions.map(({ userAddress: start, range }) => `${hex(start)}+${hex(range.size)}`);
    throw new VhostdError(
      "protocol",
      `${what} at user address ${hex(userAddress)}, ${size} bytes, is not wholly inside one memory region ` +
        `(${spans.join(", ") || "there is none"})`,
      SHARE_MEMORY,
    );
  }

  /** Reads through the region's file: the front-end may have shrunk it, which must not be felt here. */
  read(gpa: number, length: number): Uint8Array {
    const region = regionOf(this.regions, gpa, length);
    if (region === undefined) {
      throw new VhostdError("badAddress", `${length} bytes at ${hex(gpa)} are not wholly inside one memory region`);
    }
    const bytes = new Uint8Array(length);
    const done = pread(region.fd.number, bytes, region.range.offset + (gpa - region.range.iova));
    if (done !== length) {
      throw new VhostdError(
        "badAddress",
        `the file of guest memory at ${hex(gpa)} ends after ${done} of ${length} bytes`,
      );
    }
    return bytes;
  }

  private async map(region: Region): Promise<void> {
    try {
      await this.mapper.mapMemory(region.range, region.fd.number);
    } catch (error) {
      const { iova, size } = region.range;
      throw new MemoryRefusal(`guest memory ${hex(iova)}+${hex(size)} cannot be mapped: ${asError(error).message}`, {
        cause: error,
        ...(error instanceof VhostdError && error.fix !== undefined ? { fix: error.fix } : {}),
      });
    }
    this.regions = [...this.regions, region];
  }

  private async unmap(region: Region): Promise<void> {
    await this.mapper.unmapMemory(region.range);
    this.regions = this.regions.filter((other) => other !== region);
    await closeFile(region.fd);
  }
}

/** What operators forget most often. */
const SHARE_MEMORY: ErrorDetails = {
  fix: "give the guest memory that is shared: memory-backend-memfd, or -file on hugetlbfs or tmpfs, with share=on",
};

/** The region that holds `length` bytes at `gpa` wholly. */
export function regionOf(regions: readonly Region[], gpa: number, length: number): Region | undefined {
  return regions.find(({ range }) => gpa >= range.iova && gpa + length <= range.iova + range.size);
}

/**
 * The one place where a region is validated, in this order: its file, its size, its place in the file, alignment,
 * addresses, overlap with `others`.
 * @throws VhostdError protocol with the value seen and the limit
 */
export function checkRegion(description: RegionDescription, fd: OwnedFd, others: readonly Region[]): DmaRange {
  const { guestAddress, size, userAddress, fileOffset } = description;
  const refuse = (what: string, details?: ErrorDetails): never => {
    throw new VhostdError("protocol", `memory region at ${hex(guestAddress)}: ${what}`, details);
  };
  const file = checkSharedFile(fd, fileOffset, size, refuse);
  for (const [name, value] of Object.entries({ guestAddress, size, userAddress, fileOffset })) {
    if (value % PAGE !== 0) refuse(`${name} ${hex(value)} is not a multiple of ${PAGE}`);
  }
  if (guestAddress + size > GUEST_ADDRESS_END) refuse(`size ${hex(size)} reaches beyond ${hex(GUEST_ADDRESS_END)}`);
  if (userAddress + size > Number.MAX_SAFE_INTEGER) {
    refuse(`user address ${hex(userAddress)} + size ${hex(size)} exceeds ${hex(Number.MAX_SAFE_INTEGER)}`);
  }
  for (const { range, userAddress: otherUser } of others) {
    if (overlap(guestAddress, size, range.iova, range.size)) {
      refuse(`size ${hex(size)} overlaps the region ${hex(range.iova)}+${hex(range.size)}`);
    }
    if (overlap(userAddress, size, otherUser, range.size)) {
      refuse(
        `user address ${hex(userAddress)}+${hex(size)} overlaps that of another, ${hex(otherUser)}+${hex(range.size)}`,
      );
    }
  }
  return { iova: guestAddress, size, file: { dev: file.dev, ino: file.ino }, offset: fileOffset };
}

/**
 * Memory that a front-end shares can be read without waiting for anybody but the kernel, and is as long as was said.
 * @param refuse throws, with what is wrong
 */
export function checkSharedFile(
  fd: OwnedFd,
  offset: number,
  size: number,
  refuse: (what: string, details?: ErrorDetails) => never,
): FileInfo {
  const file = fileInfo(fd.number);
  if (file.kind !== "regular" || (file.filesystem !== "tmpfs" && file.filesystem !== "hugetlbfs")) {
    refuse(
      `its fd is of kind ${file.kind} on filesystem ${file.filesystem}, must be a regular file on tmpfs or hugetlbfs`,
      SHARE_MEMORY,
    );
  }
  if (size === 0) refuse("its size is 0, must be at least 4096");
  if (offset + size > file.size) {
    refuse(`offset ${hex(offset)} + size ${hex(size)} exceeds the file's ${hex(file.size)} bytes`);
  }
  return file;
}

/** Offsets do not count: REM_MEM_REG has none. */
function describes({ guestAddress, size, userAddress }: RegionDescription, region: Region): boolean {
  const { range } = region;
  return range.iova === guestAddress && range.size === size && region.userAddress === userAddress;
}

function overlap(start: number, size: number, otherStart: number, otherSize: number): boolean {
  return start < otherStart + otherSize && otherStart < start + size;
}

function sameRange({ range: a }: Region, { range: b }: Region): boolean {
  return (
    a.iova === b.iova &&
    a.size === b.size &&
    a.offset === b.offset &&
    a.file.dev === b.file.dev &&
    a.file.ino === b.file.ino
  );
}

async function closeAll(fds: readonly OwnedFd[]): Promise<void> {
  await Promise.all(fds.map(closeFile));
}

async function closeFile(fd: OwnedFd): Promise<void> {
  if (fd.closed) return;
  if (isBigMemory(fd)) await slowClose(fd);
  else fd[Symbol.dispose]();
}

/** Of any other file, which a refused region may have, nobody knows when its close returns. */
function isBigMemory(fd: OwnedFd): boolean {
  try {
    const { size, filesystem } = fileInfo(fd.number);
    return filesystem !== "other" && size >= BIG_FILE;
  } catch {
    return false;
  }
}

function hex(value: number): string {
  return `0x${value.toString(16)}`;
}
