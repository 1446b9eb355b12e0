import { SystemError } from "../base/errors.ts";
import type { OwnedFd } from "../native/fd.ts";
import { fileInfo } from "../native/sys.ts";
import {
  DMA_MAP,
  DMA_UNMAP,
  DmaFlag,
  IRQ_INFO,
  IRQ_SET,
  IrqIndex,
  IrqSetFlag,
  REGION_ACCESS,
  REGION_INFO,
  REGION_IO_FDS,
  SET_KICK,
  SetKickFlag,
} from "../vfio-user/messages.ts";
import type { Capabilities } from "../vfio-user/version.ts";
import { MEMORY_LIMITS } from "./memory-share.ts";

/**
 * The one place where a client's requests are believed or not: sizes, indices, flags, ranges and the kinds of
 * descriptors. Everything here throws SystemError with the errno that the client is answered, the value seen and the
 * limit.
 */

/** What the server takes. The kernel carries at most 253 descriptors in a message. */
export const SERVER_CAPABILITIES: Capabilities = {
  maxMsgFds: 253,
  maxDataTransfer: 1 << 20,
  maxDmaMaps: MEMORY_LIMITS.ranges,
  pageSizes: 4096,
  kickFds: 1,
  queueStats: 1,
};

const PAGE = 4096;
const EINVAL = 22;
const EOPNOTSUPP = 95;
/** VFIO_DMA_UNMAP_FLAG_ALL. */
const UNMAP_ALL = 0x2;

/** A table of messages.ts, as far as reading goes. */
interface Table<T> {
  readonly name: string;
  readonly size: number;
  read(bytes: Uint8Array, at?: number): T;
}

export interface MapRequest {
  readonly iova: number;
  readonly size: number;
  readonly offset: number;
  readonly writable: boolean;
}

export function decodeMap(body: Uint8Array, fds: readonly OwnedFd[]): MapRequest {
  const { flags, offset, address, size } = fixedPart(DMA_MAP, body);
  checkRange(address, size);
  if ((flags & ~(DmaFlag.readable | DmaFlag.writeable)) !== 0 || (flags & DmaFlag.readable) === 0) {
    throw refusal(EINVAL, `DMA map has flags 0x${flags.toString(16)}; readable is needed, writeable may be added`);
  }
  if (fds.length === 0) {
    throw refusal(EOPNOTSUPP, "DMA map has no file descriptor: memory is reached through files only");
  }
  if (fds.length > 1) throw refusal(EINVAL, `DMA map has ${fds.length} file descriptors; 1`);
  if (offset % PAGE !== 0) throw refusal(EINVAL, `offset 0x${offset.toString(16)} is not a multiple of ${PAGE}`);
  const file = fileInfo(fds[0]!.number);
  // Whoever reads a file of another kind of file system can be made to wait for ever.
  if (file.kind !== "regular" || file.filesystem === "other") {
    throw refusal(EINVAL, `memory is a ${file.kind} file on ${file.filesystem}; a file on tmpfs or hugetlbfs is taken`);
  }
  // The last page is there as a whole, however little of it the file has.
  if (offset + size > Math.ceil(file.size / file.pageSize) * file.pageSize) {
    throw refusal(EINVAL, `${size} bytes at ${offset} of a memory file of ${file.size} bytes`);
  }
  return { iova: address, size, offset, writable: (flags & DmaFlag.writeable) !== 0 };
}

/** @returns "all", or a range */
export function decodeUnmap(body: Uint8Array): "all" | { readonly iova: number; readonly size: number } {
  const { flags, address, size } = fixedPart(DMA_UNMAP, body);
  if (flags === UNMAP_ALL && address === 0 && size === 0) return "all";
  if (flags !== 0) throw refusal(EINVAL, `DMA unmap has flags 0x${flags.toString(16)}; none is taken with a range`);
  checkRange(address, size);
  return { iova: address, size };
}

export function decodeRegionIndex(body: Uint8Array, regions: number): { readonly index: number } {
  return within(fixedPart(REGION_INFO, body), regions, "region");
}

export function decodeIoFdsRequest(
  body: Uint8Array,
  regions: number,
): { readonly index: number; readonly argsz: number } {
  const { index, argsz } = within(fixedPart(REGION_IO_FDS, body), regions, "region");
  return { index, argsz };
}

export function decodeIrqIndex(body: Uint8Array, irqs: number): { readonly index: number } {
  return within(fixedPart(IRQ_INFO, body), irqs, "interrupt type");
}

/** What is asked of a range of MSI-X vectors. */
export type SetIrqs = { readonly start: number; readonly count: number } & (
  | { readonly action: "route" | "unroute" }
  | { readonly action: "trigger"; readonly chosen: readonly boolean[] }
);

export function decodeSetIrqs(body: Uint8Array, fds: readonly OwnedFd[], vectors: number): SetIrqs {
  const { flags, index, start, count } = fixedPart(IRQ_SET, body);
  const { dataNone, dataBool, dataEventfd, actionTrigger } = IrqSetFlag;
  if (index !== IrqIndex.msix) throw refusal(EINVAL, `interrupt type ${index}; the function has MSI-X (2) only`);
  if (start + count > vectors) throw refusal(EINVAL, `vectors ${start} to ${start + count}; there are ${vectors}`);
  if ((flags & actionTrigger) === 0) throw refusal(EOPNOTSUPP, "masking is done in the MSI-X table");
  const data = flags & ~actionTrigger;
  if (data === dataNone) {
    // Nothing of nothing takes all routes away (VFIO_DEVICE_SET_IRQS).
    if (start === 0 && count === 0) return { start: 0, count: vectors, action: "unroute" };
    return { start, count, action: "trigger", chosen: Array.from({ length: count }, () => true) };
  }
  if (data === dataBool) {
    const values = body.subarray(IRQ_SET.size);
    if (values.length < count) throw refusal(EINVAL, `${values.length} values for ${count} vectors`);
    return { start, count, action: "trigger", chosen: Array.from({ length: count }, (_, i) => values[i] !== 0) };
  }
  if (data !== dataEventfd) throw refusal(EINVAL, `interrupt flags 0x${flags.toString(16)} make no sense`);
  if (fds.length === 0) return { start, count, action: "unroute" };
  if (fds.length !== count) throw refusal(EINVAL, `${fds.length} eventfds for ${count} vectors`);
  for (const fd of fds) {
    const { kind } = fileInfo(fd.number);
    if (kind !== "eventfd") throw refusal(EINVAL, `an interrupt's descriptor is a ${kind} file; an eventfd is taken`);
  }
  return { start, count, action: "route" };
}

/** @param queueAt the queue whose doorbell lies there @returns whether an eventfd came, which is the queue's kick then */
export function decodeSetKick(
  body: Uint8Array,
  fds: readonly OwnedFd[],
  queueAt: (region: number, offset: number) => number | undefined,
): { readonly queue: number; readonly connect: boolean } {
  const { flags, region, reserved, offset } = fixedPart(SET_KICK, body);
  if ((flags & ~SetKickFlag.connect) !== 0 || reserved !== 0) {
    throw refusal(
      EINVAL,
      `kick has flags 0x${flags.toString(16)}, reserved 0x${reserved.toString(16)}; connect (1), 0`,
    );
  }
  const connect = flags === SetKickFlag.connect;
  const expected = connect ? 1 : 0;
  if (fds.length !== expected) throw refusal(EINVAL, `kick has ${fds.length} file descriptors; ${expected}`);
  for (const fd of fds) {
    const { kind } = fileInfo(fd.number);
    if (kind !== "eventfd") throw refusal(EINVAL, `a kick's descriptor is a ${kind} file; an eventfd is taken`);
  }
  const queue = queueAt(region, offset);
  if (queue === undefined) throw refusal(EINVAL, `no doorbell at 0x${offset.toString(16)} of region ${region}`);
  return { queue, connect };
}

export interface AccessRequest {
  readonly region: number;
  readonly offset: number;
  readonly count: number;
}

/** @param sizeOf bytes of a region */
export function decodeAccess(body: Uint8Array, sizeOf: (region: number) => number): AccessRequest {
  const { region, offset, count } = fixedPart(REGION_ACCESS, body);
  const size = sizeOf(region);
  if (size === 0) throw refusal(EINVAL, `region ${region} is not there`);
  if (count === 0 || count > SERVER_CAPABILITIES.maxDataTransfer) {
    throw refusal(EINVAL, `an access of ${count} bytes; 1 to ${SERVER_CAPABILITIES.maxDataTransfer}`);
  }
  if (offset + count > size) throw refusal(EINVAL, `${count} bytes at ${offset} of region ${region} of ${size} bytes`);
  return { region, offset, count };
}

/** The data of a write: exactly as many bytes as it announces. */
export function dataOf(body: Uint8Array, { count }: AccessRequest): Uint8Array {
  const data = body.subarray(REGION_ACCESS.size);
  if (data.length !== count) throw refusal(EINVAL, `a write of ${count} bytes carries ${data.length}`);
  return data;
}

/** A refusal of one request; the connection goes on. */
export function refusal(errno: number, what: string): SystemError {
  return new SystemError(what, errno);
}

function checkRange(address: number, size: number): void {
  if (size === 0 || size % PAGE !== 0 || address % PAGE !== 0 || !Number.isSafeInteger(address + size)) {
    throw refusal(EINVAL, `DMA range 0x${address.toString(16)}+0x${size.toString(16)} is not made of pages`);
  }
}

function within<T extends { readonly index: number }>(value: T, limit: number, what: string): T {
  if (value.index >= limit) throw refusal(EINVAL, `${what} ${value.index} of ${limit}`);
  return value;
}

function fixedPart<T>(table: Table<T>, body: Uint8Array): T {
  if (body.length < table.size) {
    throw refusal(EINVAL, `${table.name} has ${body.length} bytes; at least ${table.size}`);
  }
  try {
    return table.read(body);
  } catch (cause) {
    throw new SystemError(`${table.name} is malformed`, EINVAL, { cause });
  }
}
