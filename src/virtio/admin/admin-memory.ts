import { VhostdError } from "../../base/errors.ts";
import type { OwnedFd } from "../../native/fd.ts";
import { fileInfo, memfd, pread, pwrite, sealSize } from "../../native/sys.ts";
import type { AddressSpace } from "../../pci/address-space.ts";
import type { DmaDomain } from "../../pci/dma-domain.ts";
import { descSize, deviceSize, driverSize, RING_ALIGNMENT } from "../split-ring.ts";
import { journalSize } from "./admin-journal.ts";

/** Who holds the memory in the PF's domain. */
export const ADMIN_MEMORY_OWNER = "admin queue";
/** Descriptors of one command at most: header, data, payload, result, status. */
export const SLOT_DESCRIPTORS = 5;
/** The same, of the command that finds out whether there is anybody: header, result, status. */
const LIFE_SIGN_DESCRIPTORS = 3;
/** Entries of the ring: room for one command and the life sign at least, for all VFs of a PF at most. */
export const ADMIN_RING_SIZE = { min: SLOT_DESCRIPTORS + LIFE_SIGN_DESCRIPTORS, max: 2048 } as const;
/** Bytes of the payload, and of the result, of one command at most. */
export const TRANSFER_MAX = 16 << 10;
/** Bytes of the header, and of the data, of one command at most. */
export const HEADER_MAX = 64;
export const DATA_MAX = 128;

/** The header, the data and the status of a command, in a cell of its own. Bytes. */
const CELL = { header: 0, data: HEADER_MAX, status: HEADER_MAX + DATA_MAX, size: 256 } as const;
/** Below it an address is more likely a mistake of the device than ours. */
const LOWEST_IOVA = 1 << 20;
const PAGE = 4096;

/** The address space of a PF: its domain, with no guest's memory in it, and what can be mapped there. */
export interface AdminDma {
  readonly domain: DmaDomain;
  readonly space: Pick<AddressSpace, "ioRanges" | "pageSize">;
}

/** Where the parts of the queue are, by offset in its file. Bytes. */
interface Places {
  readonly driver: number;
  readonly device: number;
  readonly cells: number;
  readonly transfers: number;
  /** Page-aligned, and within one page. */
  readonly journal: number;
  readonly size: number;
}

/**
 * The memory of an admin queue: rings, buffers and journal in a file of our own, which the device reaches at `iova`. It
 * is read and written by system calls only: there is no mapping that the next process would have to make again.
 */
export class AdminMemory implements Disposable {
  /** Commands that have room, beside the life sign: its slot is the one behind theirs. */
  readonly slots: number;
  private readonly places: Places;

  private constructor(
    readonly file: OwnedFd,
    readonly iova: number,
    /** Entries of the ring. */
    readonly ringSize: number,
  ) {
    this.slots = slotsOf(ringSize);
    this.places = placesOf(ringSize);
  }

  /**
   * Fresh memory, mapped for the function of the domain.
   * @param ringSize a power of two, see ADMIN_RING_SIZE
   * @throws VhostdError iommuDomain where there is no room, or what the transport says
   */
  static async claim({ domain, space }: AdminDma, ringSize: number): Promise<AdminMemory> {
    using undo = new DisposableStack();
    const size = alignUp(placesOf(ringSize).size, space.pageSize);
    const file = undo.use(memfd(ADMIN_MEMORY_OWNER, size));
    sealSize(file.number);
    const iova = findRoom(space, size);
    const { dev, ino } = fileInfo(file.number);
    await domain.claim(ADMIN_MEMORY_OWNER, { iova, size, offset: 0, file: { dev, ino } }, file.number);
    undo.move();
    return new AdminMemory(file, iova, ringSize);
  }

  /** Memory that is mapped already. Takes the fd where it does not throw. @throws VhostdError invalid */
  static revive(file: OwnedFd, iova: number, ringSize: number): AdminMemory {
    const { size, filesystem } = fileInfo(file.number);
    const needed = placesOf(ringSize).size;
    if (filesystem === "other" || size < needed) {
      throw new VhostdError("invalid", `the stored memory of the admin queue is no memory file of ${needed} bytes`);
    }
    return new AdminMemory(file, iova, ringSize);
  }

  /** Addresses of the three parts of the ring, as the device sees them. */
  get ring(): { desc: number; driver: number; device: number } {
    const { iova, places } = this;
    return { desc: iova, driver: iova + places.driver, device: iova + places.device };
  }

  /** Offsets of the ring's parts, and of what the driver keeps for itself. */
  get ringPlaces(): { driver: number; device: number; journal: number } {
    return this.places;
  }

  /** Offsets of a slot's buffers. */
  slot(index: number): { header: number; data: number; status: number; payload: number; result: number } {
    const cell = this.places.cells + index * CELL.size;
    const transfer = this.places.transfers + index * 2 * TRANSFER_MAX;
    return {
      header: cell + CELL.header,
      data: cell + CELL.data,
      status: cell + CELL.status,
      payload: transfer,
      result: transfer + TRANSFER_MAX,
    };
  }

  /** @throws VhostdError io where the file has become shorter */
  read(offset: number, length: number): Uint8Array<ArrayBuffer> {
    const bytes = new Uint8Array(length);
    if (length > 0 && pread(this.file.number, bytes, offset) !== length) throw shrunk();
    return bytes;
  }

  /** @throws VhostdError io */
  write(offset: number, bytes: Uint8Array): void {
    if (bytes.length > 0 && pwrite(this.file.number, bytes, offset) !== bytes.length) throw shrunk();
  }

  /** @throws VhostdError io */
  readU16(offset: number): number {
    const [low = 0, high = 0] = this.read(offset, 2);
    return low | (high << 8);
  }

  /** @throws VhostdError io */
  writeU16(offset: number, value: number): void {
    this.write(offset, Uint8Array.of(value & 0xff, value >> 8));
  }

  /** Lets go of the file; what is mapped stays mapped. */
  [Symbol.dispose](): void {
    this.file[Symbol.dispose]();
  }
}

function placesOf(ringSize: number): Places {
  const driver = descSize(ringSize);
  const device = alignUp(driver + driverSize(ringSize), RING_ALIGNMENT.device);
  const slots = slotsOf(ringSize) + 1;
  const cells = alignUp(device + deviceSize(ringSize), CELL.size);
  const transfers = alignUp(cells + slots * CELL.size, PAGE);
  const journal = alignUp(transfers + slots * 2 * TRANSFER_MAX, PAGE);
  return { driver, device, cells, transfers, journal, size: alignUp(journal + journalSize(slots), PAGE) };
}

function slotsOf(ringSize: number): number {
  return Math.floor((ringSize - LIFE_SIGN_DESCRIPTORS) / SLOT_DESCRIPTORS);
}

/** @throws VhostdError iommuDomain */
function findRoom({ ioRanges, pageSize }: AdminDma["space"], size: number): number {
  for (const { start, end } of ioRanges) {
    const iova = alignUp(Math.max(start, LOWEST_IOVA), pageSize);
    if (iova + size - 1 <= end) return iova;
  }
  throw new VhostdError("iommuDomain", `the IOMMU has no room for an admin queue of ${size} bytes`);
}

function alignUp(value: number, unit: number): number {
  return Math.ceil(value / unit) * unit;
}

function shrunk(): VhostdError {
  return new VhostdError("io", "its memory was made smaller by the device's process");
}
