import { VhostdError } from "../../base/errors.ts";
import type { StructValue } from "../../base/layout.ts";
import { fileInfo } from "../../native/sys.ts";
import {
  DEVICE_INFO,
  DeviceFlag,
  IOEVENTFD_DATAMATCH,
  IoFdType,
  IRQ_INFO,
  IrqInfoFlag,
  QUEUE_COUNTERS,
  QUEUE_STATS,
  REGION_ACCESS,
  REGION_CAP,
  REGION_CAP_SPARSE_MMAP,
  REGION_INFO,
  REGION_IO_FDS,
  Region,
  RegionFlag,
  SPARSE_AREA,
  SPARSE_MMAP,
  SUB_REGION,
} from "../../vfio-user/messages.ts";
import type { QueueStats } from "../function.ts";
import type { Reply } from "./client.ts";

/**
 * The one place where a server's answers are believed or not: sizes, indices, offsets and numbers of descriptors.
 * Everything here throws VhostdError protocol, with the value seen and the limit.
 */

/** Regions of a device beyond those of PCI mean nothing here; a server that claims more than this is not sane. */
const REGIONS_MAX = 256;
const REGION_SIZE_MAX = 2 ** 46;
/** MSI-X table size (PCI 3.0, 6.8.2.3). */
const VECTORS_MAX = 2048;
const SUB_REGIONS_MAX = 4096;
const AREAS_MAX = 64;
/** More queues than a virtio device has doorbells for here. */
const QUEUES_MAX = 4096;

export type Span = { readonly offset: number; readonly size: number };

/** One region; plain data. */
export type RegionInfo = {
  /** Bytes; 0 where the device has no such region. */
  readonly size: number;
  /** Where in its file, on tmpfs or hugetlbfs, the region begins, and what of it can be mapped. Page-aligned. */
  readonly mappable: { readonly fileOffset: number; readonly areas: readonly Span[] } | null;
};

/** Writes to this place of a region may be replaced by a signal of an eventfd; plain data. */
export type IoEventfd = Span & {
  /** Only writes of this value; null for any. */
  readonly match: number | null;
  /** Index among the descriptors of the answer. */
  readonly fd: number;
};

/** @throws VhostdError protocol where it is no PCI device with a configuration space */
export function decodeDeviceInfo(reply: Reply): void {
  const { flags, regions } = fixedPart(DEVICE_INFO, reply);
  if ((flags & DeviceFlag.pci) === 0) throw bad("the device is not a PCI device");
  if (regions <= Region.config || regions > REGIONS_MAX) {
    throw bad(`the device has ${regions} regions; ${Region.config + 1} to ${REGIONS_MAX}`);
  }
}

/** @param page bytes; what can be mapped is aligned to it */
export function decodeRegionInfo(reply: Reply, index: number, page: number): RegionInfo {
  const info = fixedPart(REGION_INFO, reply);
  if (info.index !== index) throw bad(`region ${info.index} was answered where ${index} was asked`);
  if (info.size > REGION_SIZE_MAX) throw bad(`region ${index} has ${info.size} bytes; at most ${REGION_SIZE_MAX}`);
  if ((info.flags & RegionFlag.mmap) === 0 || reply.fds.length === 0) return { size: info.size, mappable: null };
  if (reply.fds.length !== 1) throw bad(`region ${index} came with ${reply.fds.length} descriptors; 1`);
  const areas = sparseAreas(reply.body, info) ?? [{ offset: 0, size: info.size }];
  const file = fileInfo(reply.fds[0]!.number);
  // Who serves another filesystem could keep the relay, which serves all functions, waiting for a page.
  if (file.filesystem === "other") return { size: info.size, mappable: null };
  for (const { offset, size } of areas) {
    if (offset % page !== 0 || size % page !== 0 || size === 0 || offset + size > info.size) {
      throw bad(`region ${index} cannot have a mappable area of ${size} bytes at ${offset}; it has ${info.size} bytes`);
    }
    if (info.offset + offset + size > file.size) {
      throw bad(`a mappable area of region ${index} ends beyond its file of ${file.size} bytes`);
    }
  }
  if (info.offset % page !== 0)
    throw bad(`region ${index} begins at ${info.offset} of its file; a multiple of ${page}`);
  return { size: info.size, mappable: { fileOffset: info.offset, areas } };
}

/** @returns undefined where the whole region can be mapped */
function sparseAreas(body: Uint8Array, info: StructValue<typeof REGION_INFO.fields>): Span[] | undefined {
  let at = (info.flags & RegionFlag.caps) === 0 ? 0 : info.capOffset;
  while (at !== 0) {
    if (at < REGION_INFO.size || at + REGION_CAP.size > body.length) throw bad(`a region capability at byte ${at}`);
    const cap = REGION_CAP.read(body, at);
    if (cap.id === REGION_CAP_SPARSE_MMAP) return readAreas(body, at + REGION_CAP.size);
    // Ascending only, so that no list goes round in a circle.
    if (cap.next !== 0 && cap.next <= at) throw bad(`region capability at byte ${at} points back to ${cap.next}`);
    at = cap.next;
  }
  return undefined;
}

function readAreas(body: Uint8Array, at: number): Span[] {
  if (at + SPARSE_MMAP.size > body.length) throw bad("the list of mappable areas is cut short");
  const { areas } = SPARSE_MMAP.read(body, at);
  if (areas > AREAS_MAX) throw bad(`a region has ${areas} mappable areas; at most ${AREAS_MAX}`);
  const first = at + SPARSE_MMAP.size;
  if (first + areas * SPARSE_AREA.size > body.length) throw bad("the list of mappable areas is cut short");
  return Array.from({ length: areas }, (_, i) => read(SPARSE_AREA, body, first + i * SPARSE_AREA.size));
}

/** @returns bytes that the whole answer needs, where that is more than was asked for; otherwise its entries */
export function decodeIoFds(
  reply: Reply,
  region: { readonly index: number; readonly size: number },
  asked: number,
): readonly IoEventfd[] | { readonly needs: number } {
  const { argsz, index, count } = fixedPart(REGION_IO_FDS, reply);
  if (index !== region.index) throw bad(`region ${index} was answered where ${region.index} was asked`);
  if (count > SUB_REGIONS_MAX) throw bad(`region ${index} has ${count} sub-regions; at most ${SUB_REGIONS_MAX}`);
  const needs = REGION_IO_FDS.size + count * SUB_REGION.size;
  if (argsz > asked && needs > reply.body.length) return { needs };
  if (needs > reply.body.length) throw bad(`${count} sub-regions of region ${index} in ${reply.body.length} bytes`);
  const entries: IoEventfd[] = [];
  for (let i = 0; i < count; i++) {
    const { offset, size, fdIndex, type, flags, datamatch } = read(
      SUB_REGION,
      reply.body,
      REGION_IO_FDS.size + i * SUB_REGION.size,
    );
    if (type !== IoFdType.ioeventfd) continue;
    if (offset + size > region.size || size > 8) throw bad(`sub-region of ${size} bytes at ${offset}: ${region.size}`);
    if ((flags & ~IOEVENTFD_DATAMATCH) !== 0) throw bad(`sub-region at ${offset} has flags ${flags}`);
    const fd = reply.fds[fdIndex];
    if (fd === undefined) throw bad(`sub-region at ${offset} names descriptor ${fdIndex} of ${reply.fds.length}`);
    if (fileInfo(fd.number).kind !== "eventfd") throw bad(`descriptor ${fdIndex} is not an eventfd`);
    const match = (flags & IOEVENTFD_DATAMATCH) === 0 ? null : Number(datamatch & 0xffff_ffffn);
    entries.push({ offset, size, match, fd: fdIndex });
  }
  return entries;
}

/** @returns vectors that can be routed to eventfds */
export function decodeVectorCount(reply: Reply, index: number): number {
  const info = fixedPart(IRQ_INFO, reply);
  if (info.index !== index) throw bad(`interrupt type ${info.index} was answered where ${index} was asked`);
  if (info.count > VECTORS_MAX) throw bad(`the device has ${info.count} vectors; at most ${VECTORS_MAX}`);
  return (info.flags & IrqInfoFlag.eventfd) === 0 ? 0 : info.count;
}

/** The data of a region read: exactly as many bytes as were asked for. */
export function decodeRead(reply: Reply, region: number, offset: number, count: number): Uint8Array {
  const seen = fixedPart(REGION_ACCESS, reply);
  const data = reply.body.subarray(REGION_ACCESS.size);
  if (seen.region !== region || seen.offset !== offset || seen.count !== count || data.length !== count) {
    throw bad(
      `a read of ${count} bytes at ${offset} of region ${region} was answered with ${data.length} bytes at ${seen.offset} of region ${seen.region}`,
    );
  }
  return data;
}

export function checkWritten(reply: Reply, region: number, offset: number, count: number): void {
  const seen = fixedPart(REGION_ACCESS, reply);
  if (seen.region !== region || seen.offset !== offset || seen.count !== count) {
    throw bad(`of ${count} bytes for ${offset} of region ${region}, ${seen.count} were written at ${seen.offset}`);
  }
}

export function decodeQueueStats(reply: Reply): readonly QueueStats[] {
  const { count } = fixedPart(QUEUE_STATS, reply);
  const size = QUEUE_STATS.size + count * QUEUE_COUNTERS.size;
  if (count > QUEUES_MAX || size !== reply.body.length) {
    throw bad(`counters of ${count} queues in ${reply.body.length} bytes; of at most ${QUEUES_MAX} in ${size}`);
  }
  return Array.from({ length: count }, (_, queue) =>
    read(QUEUE_COUNTERS, reply.body, QUEUE_STATS.size + queue * QUEUE_COUNTERS.size),
  );
}

/** A table of messages.ts, as far as reading goes. */
interface Table<T> {
  readonly name: string;
  read(bytes: Uint8Array, at?: number): T;
}

function fixedPart<T>(table: Table<T>, reply: Reply): T {
  return read(table, reply.body, 0);
}

function read<T>(table: Table<T>, body: Uint8Array, at: number): T {
  try {
    return table.read(body, at);
  } catch (cause) {
    throw new VhostdError("protocol", `the vfio-user server's ${table.name} is malformed`, { cause });
  }
}

function bad(what: string): VhostdError {
  return new VhostdError("protocol", `the vfio-user server's answer makes no sense: ${what}`);
}
