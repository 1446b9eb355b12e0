import { expect, test } from "bun:test";
import {
  CAP_DMA_AVAILABLE,
  CAP_IOVA_RANGE,
  INFO_CAPABILITY,
  IOVA_RANGE,
  TYPE1_INFO,
} from "../../../src/pci/vfio/iommu-uapi.ts";
import { parseIovaRanges, parseType1Info } from "../../../src/pci/vfio/iova-ranges.ts";

const HOLE = [
  { start: 0n, last: 0xfedf_ffffn },
  { start: 0xfef0_0000n, last: 0x7f_ffff_ffffn },
];

/** An answer with both capabilities, and one between that nobody knows. */
function answer(): Uint8Array {
  const bytes = new Uint8Array(256);
  TYPE1_INFO.write(bytes, { argsz: 256, flags: 3, iova_pgsizes: 0x4020_1000n, cap_offset: 24 });
  CAP_IOVA_RANGE.write(bytes, { nr_iovas: 2 }, 24);
  INFO_CAPABILITY.write(bytes.subarray(0, 32), { id: 1, version: 1, next: 96 }, 24);
  for (const [i, range] of HOLE.entries()) IOVA_RANGE.write(bytes, range, 40 + 16 * i);
  INFO_CAPABILITY.write(bytes, { id: 77, version: 1, next: 120 }, 96);
  CAP_DMA_AVAILABLE.write(bytes, { avail: 65535 }, 120);
  INFO_CAPABILITY.write(bytes, { id: 3, version: 1, next: 0 }, 120);
  return bytes;
}

test("ranges, the smallest page and the mappings left are read from the kernel's answer", () => {
  expect(parseType1Info(answer())).toEqual({
    pageSize: 4096,
    ranges: [
      { start: 0, end: 0xfedf_ffff },
      { start: 0xfef0_0000, end: 0x7f_ffff_ffff },
    ],
    available: 65535,
  });
});

test("what the kernel does not tell is undefined", () => {
  const bytes = answer();
  TYPE1_INFO.write(bytes, { argsz: 24, flags: 0, iova_pgsizes: 4096n, cap_offset: 24 });
  expect(parseType1Info(bytes)).toEqual({ pageSize: undefined, ranges: undefined, available: undefined });
});

test("a chain that leads outside or in a circle ends", () => {
  const outside = answer();
  INFO_CAPABILITY.write(outside, { id: 77, version: 1, next: 4000 }, 96);
  expect(() => parseType1Info(outside)).toThrow(RangeError);
  const circle = answer();
  INFO_CAPABILITY.write(circle, { id: 77, version: 1, next: 24 }, 96);
  expect(parseType1Info(circle).available).toBeUndefined();
});

test("ranges are ordered, and end where numbers do", () => {
  const bytes = new Uint8Array(48);
  IOVA_RANGE.write(bytes, { start: 4096n, last: 0xffff_ffff_ffff_ffffn }, 0);
  IOVA_RANGE.write(bytes, { start: 0n, last: 4095n }, 16);
  IOVA_RANGE.write(bytes, { start: 1n << 60n, last: 1n << 61n }, 32);
  expect(parseIovaRanges(bytes, 0, 3)).toEqual([
    { start: 0, end: 4095 },
    { start: 4096, end: Number.MAX_SAFE_INTEGER },
  ]);
  expect(() => parseIovaRanges(bytes, 0, 4)).toThrow(RangeError);
});
