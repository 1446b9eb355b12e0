import type { DmaRange } from "../address-space.ts";
import { extentOf, slice } from "../ranges.ts";

/**
 * Bytes of the largest piece in which memory is given to the kernel. One call then takes seconds at most, there is progress to tell
 * of, and 64 TiB stay below the kernel's limit of mappings (65535 unless said otherwise). The IOMMU's largest page fits in.
 *
 * Never changes: the kernel takes mappings back only as they were made, and a later version of this program has to find
 * those of an earlier one.
 */
export const PIECE_SIZE = 2 ** 30;

/** A range as it is mapped: cut at each multiple of PIECE_SIZE of the IOVA. */
export function piecesOf(range: DmaRange): DmaRange[] {
  const { start, end } = extentOf(range);
  const pieces: DmaRange[] = [];
  for (let at = start; at < end; ) {
    const next = Math.min(end, (Math.floor(at / PIECE_SIZE) + 1) * PIECE_SIZE);
    pieces.push(slice(range, { start: at, end: next }));
    at = next;
  }
  return pieces;
}
