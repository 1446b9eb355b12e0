import type { Deadline } from "../../base/deadline.ts";
import { VhostdError } from "../../base/errors.ts";
import { Bytemap, type DirtyLogMapping, type MapForm, mapBytes } from "../../native/dirty-log.ts";
import { type DirtyLog, LOG_BYTE, LOG_PAGE, type Tracking } from "../dirty-log.ts";
import type { DirtyPagesAdmin, MapPlace } from "./dirty-pages-admin.ts";
import type { LogMemory } from "./log-memory.ts";
import { TRACKING_KIND, type TrackingModeName } from "./vendor.ts";

/** Reports that are asked for at once, so that one VF leaves room on the admin queue for others. */
const REPORTS_AT_ONCE = 4;
/**
 * Bytes of a map: in bitmaps of 16 TiB of guest memory, in bytemaps of 2 TiB. It is the front-end that says where a guest's
 * memory ends, however little it has, and all of a map may be pinned for the PF.
 */
const MAP_MAX = 2 ** 29;
/** Bytes of guest memory that a byte of a map stands for. */
const MEMORY_OF_BYTE: Readonly<Record<MapForm, number>> = { bitmap: LOG_BYTE, bytemap: LOG_PAGE };

/** Where a device notes the pages that it writes, and how that comes into the log. */
export interface DirtyMap {
  /** What the device is given to write; undefined where it keeps the map. */
  readonly place: MapPlace | undefined;
  /**
   * What the device has noted so far is in the log when it resolves.
   * @param goOn asked before each part; what is left then is found the next time
   */
  collect(deadline: Deadline, goOn: () => boolean): Promise<void>;
  /** The device notes nothing more. @throws VhostdError iommuDomain where memory stays mapped for the PF */
  release(): Promise<void>;
  /** Lets go of what is this process's; what is mapped stays mapped. */
  abandon(): void;
}

/** What the maps of a VF are made of. */
export interface MapSource {
  readonly commands: DirtyPagesAdmin;
  readonly vdevId: number;
  readonly memory: LogMemory;
  /** Every command was answered that alters the VF. */
  settled(): boolean;
}

/** Pages below the end of guest memory. */
export function pagesBelow(end: number): number {
  return Math.ceil(end / LOG_PAGE);
}

/**
 * Makes the map of one mode, which marks in `log`, the front-end's.
 * @throws VhostdError invalid, iommuDomain, io; nothing is mapped then
 */
export async function makeMap(
  mode: TrackingModeName,
  source: MapSource,
  { log, end }: Tracking,
  mapping: DirtyLogMapping,
  deadline: Deadline,
): Promise<DirtyMap> {
  const pages = pagesBelow(end);
  const { form } = TRACKING_KIND[mode];
  const bytes = mapBytes(form, pages);
  if (bytes > MAP_MAX) {
    throw new VhostdError(
      "invalid",
      `guest memory ends at 0x${end.toString(16)}, for which a map needs ${bytes} bytes; at most ${MAP_MAX}`,
      { fix: `let the VM have no memory at 0x${(MAP_MAX * MEMORY_OF_BYTE[form]).toString(16)} or above` },
    );
  }
  switch (mode) {
    case "pushBitmap":
      return await sharedBitmap(source.memory, log, pages);
    case "pushBytemap":
      return await ownBytemap(source.memory, mapping, pages);
    case "pullBitmap":
    case "pullBytemap":
      return await reports(TRACKING_KIND[mode].form, source, mapping, pages, deadline);
  }
}

/** The front-end's own log, which the device writes itself: what it has more than that is not its PF's business. */
async function sharedBitmap(memory: LogMemory, { fd, offset }: DirtyLog, pages: number): Promise<DirtyMap> {
  const length = mapBytes("bitmap", pages);
  const { address, release } = await memory.share({ fd, offset, size: length });
  return { place: { address, length }, collect: async () => {}, release, abandon: () => {} };
}

async function ownBytemap(memory: LogMemory, mapping: DirtyLogMapping, pages: number): Promise<DirtyMap> {
  const own = await memory.own(pages);
  let bytes: Bytemap;
  try {
    bytes = new Bytemap(own.memory.file.number, pages);
  } catch (error) {
    await own.release();
    throw error;
  }
  return {
    place: { address: own.address, length: pages },
    collect: () => mapping.take(bytes),
    release: () => {
      bytes[Symbol.dispose]();
      return own.release();
    },
    abandon: () => {
      bytes[Symbol.dispose]();
      own.memory[Symbol.dispose]();
    },
  };
}

async function reports(
  form: MapForm,
  { commands, vdevId }: MapSource,
  mapping: DirtyLogMapping,
  pages: number,
  deadline: Deadline,
): Promise<DirtyMap> {
  const limit = (await commands.identity(deadline))[form];
  const bitmap = form === "bitmap";
  const size = mapBytes(form, pages);
  const pull = async (offset: number, deadline: Deadline) => {
    const bytes = await commands.report(vdevId, { address: 0 }, offset, Math.min(limit, size - offset), deadline);
    // Bits behind the last page are no pages.
    if (bitmap && offset + bytes.length === size && pages % 8 !== 0)
      bytes[bytes.length - 1]! &= 0xff >> (8 - (pages % 8));
    mapping.merge(bitmap ? 8 * offset : offset, bytes, form);
  };
  return {
    place: undefined,
    collect: async (deadline, goOn) => {
      for (let at = 0; at < size && goOn(); at += REPORTS_AT_ONCE * limit) {
        const offsets = Array.from({ length: REPORTS_AT_ONCE }, (_, i) => at + i * limit);
        await Promise.all(offsets.filter((offset) => offset < size).map((offset) => pull(offset, deadline)));
      }
    },
    release: async () => {},
    abandon: () => {},
  };
}

/**
 * A log has a bit for each page below the end of guest memory.
 * @throws VhostdError invalid
 */
export function checkLog({ log, end }: Tracking): void {
  const { offset, size } = log;
  if (!Number.isSafeInteger(end) || end <= 0) throw new VhostdError("invalid", `guest memory ends at ${end}`);
  if (offset % LOG_PAGE !== 0) {
    throw new VhostdError("invalid", `the dirty log begins at ${offset} of its file, no multiple of ${LOG_PAGE}`);
  }
  const needed = mapBytes("bitmap", pagesBelow(end));
  if (size >= needed) return;
  throw new VhostdError(
    "invalid",
    `the dirty log has ${size} bytes; guest memory ends at 0x${end.toString(16)}, for which it needs ${needed}`,
    {
      data: { size, needed, end },
      fix: `the VMM has to give a log with a bit for each page of ${LOG_PAGE} bytes below the end of guest memory`,
    },
  );
}
