import { type LogPlace, type LogRange, mapSize } from "../native/ring-log.ts";
import {
  DirtyPagesCommand,
  type DirtyPagesCommandName,
  PENDING_MAP_RESULT,
  REPORT_MAP_DATA,
  START_TRACKING_DATA,
  TRACKED_RANGE_DATA,
  TRACKING_IDENTITY_RESULT,
  TRACKING_KIND,
  TRACKING_MAP_PIECE,
  TrackingMode,
  type TrackingModeName,
} from "../virtio/admin/vendor.ts";
import { AdminError } from "./admin-error.ts";
import { needRoom, readData } from "./command-data.ts";
import type { TrackingPlan, VfTracker } from "./vf-tracker.ts";

/** Answered to trackingIdentity. A report of that many pages has 512 KiB, whatever the mode. */
const LIMITS = { log2PagesPullBitmap: 22, log2PagesPullBytemap: 19, rangesMax: 256 } as const;
const REPORT_MAX = 2 ** LIMITS.log2PagesPullBytemap;
const PAGE_SIZE_MIN = 4096;
/** Of a map of our own: with the smallest pages 4 TiB, as much as a function can reach. */
const PULL_PAGES_MAX = 2 ** 30;

/** A command of class 65, taken apart. */
export type TrackingCommand =
  | { readonly name: "trackingIdentity" }
  | { readonly name: "startTracking"; readonly vdevId: number; readonly plan: TrackingPlan }
  | { readonly name: "stopTracking" | "pendingMap"; readonly vdevId: number; readonly address: number }
  | {
      readonly name: "reportMap";
      readonly vdevId: number;
      readonly address: number;
      readonly offset: number;
      readonly length: number;
    };

/**
 * @param data behind the header
 * @param room device-writable bytes for the result
 * @param modes that the PF offers
 * @throws AdminError invalidCommand, dataTransfer where bytes are missing, error where a value does not fit
 */
export function decodeTracking(
  command: number,
  data: Uint8Array,
  room: number,
  modes: ReadonlySet<TrackingModeName>,
): TrackingCommand {
  const name = Object.entries(DirtyPagesCommand).find(([, number]) => number === command)?.[0];
  if (name === undefined) throw new AdminError("invalidCommand", `there is no command ${command} of dirty pages`);
  switch (name as DirtyPagesCommandName) {
    case "trackingIdentity":
      needRoom(room, TRACKING_IDENTITY_RESULT.size);
      return { name: "trackingIdentity" };
    case "startTracking": {
      const { vdevId, ...start } = readData(START_TRACKING_DATA, data);
      return { name: "startTracking", vdevId, plan: decodePlan(start, data, modes) };
    }
    case "stopTracking":
      return { name: "stopTracking", ...trackedRange(data) };
    case "pendingMap":
      needRoom(room, PENDING_MAP_RESULT.size);
      return { name: "pendingMap", ...trackedRange(data) };
    case "reportMap": {
      const { vdevId, rangeAddress, ...part } = readData(REPORT_MAP_DATA, data);
      const length = Number(part.length);
      needRoom(room, length);
      if (length > REPORT_MAX)
        throw new AdminError("error", `${length} bytes of map in a report; at most ${REPORT_MAX}`);
      return { name: "reportMap", vdevId, address: Number(rangeAddress), offset: Number(part.offset), length };
    }
  }
}

/** @returns the result. @throws AdminError */
export async function executeTracking(
  command: Exclude<TrackingCommand, { readonly name: "trackingIdentity" }>,
  tracker: VfTracker,
): Promise<Uint8Array> {
  switch (command.name) {
    case "startTracking":
      await tracker.start(command.plan);
      return new Uint8Array(0);
    case "stopTracking":
      await tracker.stop(command.address);
      return new Uint8Array(0);
    case "pendingMap":
      return PENDING_MAP_RESULT.encode({ pending: BigInt(tracker.pending(command.address)) });
    case "reportMap":
      return tracker.report(command.address, command.offset, command.length);
  }
}

export function trackingIdentity(): Uint8Array {
  return TRACKING_IDENTITY_RESULT.encode(LIMITS);
}

/** Numbers beyond 2^53 are beyond any range, too. */
function trackedRange(data: Uint8Array) {
  const { vdevId, rangeAddress } = readData(TRACKED_RANGE_DATA, data);
  return { vdevId, address: Number(rangeAddress) };
}

interface Start {
  readonly mode: number;
  readonly pageSize: number;
  readonly rangeAddress: bigint;
  readonly rangeLength: bigint;
}

function decodePlan(start: Start, data: Uint8Array, modes: ReadonlySet<TrackingModeName>): TrackingPlan {
  const mode = (Object.keys(TrackingMode) as TrackingModeName[]).find((each) => TrackingMode[each] === start.mode);
  if (mode === undefined || !modes.has(mode)) {
    throw new AdminError("error", `mode ${mode ?? start.mode} is not offered; ${[...modes].join(", ")}`);
  }
  const range = decodeRange(start);
  const { form, push } = TRACKING_KIND[mode];
  const needed = mapSize(form, range);
  if (!push) {
    const pages = range.length / range.pageSize;
    if (pages > PULL_PAGES_MAX) throw new AdminError("error", `${pages} pages to be kept; at most ${PULL_PAGES_MAX}`);
    return { mode, range, places: [] };
  }
  const places = decodePlaces(data);
  const given = places.reduce((sum, { length }) => sum + length, 0);
  if (given < needed)
    throw new AdminError("error", `the map has ${given} bytes; ${needed} for ${range.length} of memory`);
  return { mode, range, places };
}

function decodeRange({ pageSize, rangeAddress, rangeLength }: Start): LogRange {
  if (pageSize < PAGE_SIZE_MIN || !Number.isInteger(Math.log2(pageSize))) {
    throw new AdminError("error", `pages of ${pageSize} bytes; a power of two from ${PAGE_SIZE_MIN}`);
  }
  const text = `range 0x${rangeAddress.toString(16)}+0x${rangeLength.toString(16)}`;
  const end = rangeAddress + rangeLength;
  if (rangeLength === 0n || end > BigInt(Number.MAX_SAFE_INTEGER)) {
    throw new AdminError("error", `${text} is empty, or ends beyond 2^53`);
  }
  if ((rangeAddress | rangeLength) % BigInt(pageSize) !== 0n) {
    throw new AdminError("error", `${text} is not made of pages of ${pageSize}`);
  }
  return { address: Number(rangeAddress), length: Number(rangeLength), pageSize };
}

/** The pieces of the map, behind the head. */
function decodePlaces(data: Uint8Array): LogPlace[] {
  const { size } = TRACKING_MAP_PIECE;
  const count = Math.ceil((data.length - START_TRACKING_DATA.size) / size);
  if (count === 0 || count > LIMITS.rangesMax) {
    throw new AdminError("error", `the map is in ${count} pieces; 1 to ${LIMITS.rangesMax}`);
  }
  return Array.from({ length: count }, (_, index) => {
    const { address, length } = readData(TRACKING_MAP_PIECE, data, START_TRACKING_DATA.size + index * size);
    if (length === 0 || address + BigInt(length) > BigInt(Number.MAX_SAFE_INTEGER)) {
      throw new AdminError("error", `piece 0x${address.toString(16)}+0x${length.toString(16)} of the map is no memory`);
    }
    return { address: Number(address), length };
  });
}
