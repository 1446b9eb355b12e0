import {
  CAP_DMA_AVAILABLE,
  CAP_IOVA_RANGE,
  INFO_CAPABILITY,
  IOVA_RANGE,
  TYPE1_INFO,
  Type1Capability,
  Type1InfoFlag,
} from "./iommu-uapi.ts";

/** Inclusive end. */
export interface IovaRange {
  readonly start: number;
  readonly end: number;
}

/** What VFIO_IOMMU_GET_INFO says; undefined is what it does not. */
export interface Type1Info {
  /** Smallest page of the IOMMU, bytes. */
  readonly pageSize: number | undefined;
  readonly ranges: readonly IovaRange[] | undefined;
  /** How many more mappings the kernel takes. */
  readonly available: number | undefined;
}

/** @throws RangeError where the answer points outside itself */
export function parseType1Info(bytes: Uint8Array): Type1Info {
  const { flags, iova_pgsizes, cap_offset } = TYPE1_INFO.read(bytes);
  let ranges: IovaRange[] | undefined;
  let available: number | undefined;
  const offsets = new Set<number>();
  let at = (flags & Type1InfoFlag.capabilities) === 0 ? 0 : cap_offset;
  while (at !== 0 && !offsets.has(at)) {
    offsets.add(at);
    const { id, next } = INFO_CAPABILITY.read(bytes, at);
    if (id === Type1Capability.iovaRange) {
      const { nr_iovas } = CAP_IOVA_RANGE.read(bytes, at);
      ranges = parseIovaRanges(bytes, at + CAP_IOVA_RANGE.size, nr_iovas);
    }
    if (id === Type1Capability.dmaAvailable) available = CAP_DMA_AVAILABLE.read(bytes, at).avail;
    at = next;
  }
  const pageSizes = (flags & Type1InfoFlag.pageSizes) === 0 ? 0n : iova_pgsizes;
  return { pageSize: pageSizes === 0n ? undefined : Number(pageSizes & -pageSizes), ranges, available };
}

/**
 * Ranges as both interfaces write them. What lies beyond 2^53 is left out: no guest has memory there.
 * @throws RangeError where there are fewer than `count`
 */
export function parseIovaRanges(bytes: Uint8Array, at: number, count: number): IovaRange[] {
  const highest = BigInt(Number.MAX_SAFE_INTEGER);
  const ranges: IovaRange[] = [];
  for (let i = 0; i < count; i++) {
    const { start, last } = IOVA_RANGE.read(bytes, at + i * IOVA_RANGE.size);
    if (start > highest) continue;
    ranges.push({ start: Number(start), end: Number(last > highest ? highest : last) });
  }
  return ranges.sort((a, b) => a.start - b.start);
}
