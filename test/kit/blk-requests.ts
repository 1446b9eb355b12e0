import type { Completed } from "./driver-ring.ts";

/** Framing of virtio-blk requests (VIRTIO 1.2, 5.2.6) for tests. Sectors are 512 bytes. */

export const BlkType = { in: 0, out: 1, flush: 4, getId: 8, discard: 11, writeZeroes: 13 } as const;
export const BlkStatus = { ok: 0, ioError: 1, unsupported: 2 } as const;
export const SECTOR = 512;

/** Buffers of one request as a ring takes them. */
export interface BlkRequest {
  readonly readable: readonly Uint8Array[];
  /** Sizes of the device-writable buffers; the last is the status byte. */
  readonly writable: readonly number[];
}

export interface DiscardSegment {
  readonly sector: number;
  readonly sectors: number;
  /** WRITE_ZEROES only: the device may deallocate. */
  readonly unmap?: boolean;
}

export function header(type: number, sector = 0): Uint8Array {
  const view = new DataView(new ArrayBuffer(16));
  view.setUint32(0, type, true);
  view.setBigUint64(8, BigInt(sector), true);
  return new Uint8Array(view.buffer);
}

/** @param lengths bytes of each buffer to read into */
export function readRequest(sector: number, ...lengths: readonly number[]): BlkRequest {
  return { readable: [header(BlkType.in, sector)], writable: [...lengths, 1] };
}

export function writeRequest(sector: number, ...data: readonly Uint8Array[]): BlkRequest {
  return { readable: [header(BlkType.out, sector), ...data], writable: [1] };
}

export function flushRequest(): BlkRequest {
  return { readable: [header(BlkType.flush)], writable: [1] };
}

export function getIdRequest(): BlkRequest {
  return { readable: [header(BlkType.getId)], writable: [20, 1] };
}

export function discardRequest(...segments: readonly DiscardSegment[]): BlkRequest {
  return { readable: [header(BlkType.discard), encodeSegments(segments)], writable: [1] };
}

export function writeZeroesRequest(...segments: readonly DiscardSegment[]): BlkRequest {
  return { readable: [header(BlkType.writeZeroes), encodeSegments(segments)], writable: [1] };
}

/** Status byte and data of a completed request. */
export function blkResult(completed: Completed): { readonly status: number; readonly data: Uint8Array } {
  const status = completed.written.at(-1)?.at(-1);
  if (status === undefined) throw new Error("the request had no status byte");
  const data = completed.written.slice(0, -1);
  const joined = new Uint8Array(data.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of data) {
    joined.set(part, at);
    at += part.length;
  }
  return { status, data: joined };
}

function encodeSegments(segments: readonly DiscardSegment[]): Uint8Array {
  const view = new DataView(new ArrayBuffer(16 * segments.length));
  for (const [index, { sector, sectors, unmap }] of segments.entries()) {
    view.setBigUint64(16 * index, BigInt(sector), true);
    view.setUint32(16 * index + 8, sectors, true);
    view.setUint32(16 * index + 12, unmap === true ? 1 : 0, true);
  }
  return new Uint8Array(view.buffer);
}
