import type { OwnedFd } from "../../native/fd.ts";
import type { DmaDomain } from "../../pci/dma-domain.ts";
import { checkMemory, claimMemory, OwnMemory } from "../own-memory.ts";
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
const PAGE = 4096;

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

/** The memory of an admin queue: rings, buffers and journal. */
export class AdminMemory extends OwnMemory {
  /** Commands that have room, beside the life sign: its slot is the one behind theirs. */
  readonly slots: number;
  private readonly places: Places;

  private constructor(
    file: OwnedFd,
    iova: number,
    /** Entries of the ring. */
    readonly ringSize: number,
  ) {
    super(file, iova);
    this.slots = slotsOf(ringSize);
    this.places = placesOf(ringSize);
  }

  /**
   * Fresh memory, mapped for the function of the domain.
   * @param ringSize a power of two, see ADMIN_RING_SIZE
   * @throws VhostdError iommuDomain where there is no room, or what the transport says
   */
  static async claim(domain: DmaDomain, ringSize: number): Promise<AdminMemory> {
    const { file, iova } = await claimMemory(domain, ADMIN_MEMORY_OWNER, placesOf(ringSize).size);
    return new AdminMemory(file, iova, ringSize);
  }

  /** Memory that is mapped already. Takes the fd where it does not throw. @throws VhostdError invalid */
  static revive(file: OwnedFd, iova: number, ringSize: number): AdminMemory {
    checkMemory(file, placesOf(ringSize).size, "the admin queue");
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

function alignUp(value: number, unit: number): number {
  return Math.ceil(value / unit) * unit;
}
