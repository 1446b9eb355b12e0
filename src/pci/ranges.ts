import type { DmaRange } from "./address-space.ts";

/** Bytes from `start` up to but without `end`. */
export interface Extent {
  readonly start: number;
  readonly end: number;
}

export function extentOf(range: DmaRange): Extent {
  return { start: range.iova, end: range.iova + range.size };
}

export function overlaps(a: Extent, b: Extent): boolean {
  return a.start < b.end && b.start < a.end;
}

/** What of `whole` none of `holes` covers, ascending. */
export function subtract(whole: Extent, holes: readonly Extent[]): Extent[] {
  const gaps: Extent[] = [];
  let start = whole.start;
  for (const hole of [...holes].sort((a, b) => a.start - b.start)) {
    if (!overlaps(hole, whole)) continue;
    if (hole.start > start) gaps.push({ start, end: hole.start });
    start = Math.max(start, hole.end);
  }
  if (start < whole.end) gaps.push({ start, end: whole.end });
  return gaps;
}

/**
 * The highest place for `size` bytes inside one of `wholes` that meets none of `holes`; undefined where there is none.
 * @param unit the place is a multiple of it
 */
export function highestPlace(
  wholes: readonly Extent[],
  holes: readonly Extent[],
  size: number,
  unit: number,
): number | undefined {
  const places = wholes.flatMap((whole) =>
    subtract(whole, holes).flatMap(({ start, end }) => {
      const place = Math.floor((Math.min(end, Number.MAX_SAFE_INTEGER) - size) / unit) * unit;
      return place < start ? [] : [place];
    }),
  );
  return places.length === 0 ? undefined : Math.max(...places);
}

/** The part of a range that lies in `extent`, with its place in the file. */
export function slice(range: DmaRange, extent: Extent): DmaRange {
  const start = Math.max(range.iova, extent.start);
  const end = Math.min(range.iova + range.size, extent.end);
  return { iova: start, size: end - start, file: range.file, offset: range.offset + (start - range.iova) };
}

/** Both give the same bytes of the same file at every address they share. */
export function sameBacking(a: DmaRange, b: DmaRange): boolean {
  return a.file.dev === b.file.dev && a.file.ino === b.file.ino && a.offset - a.iova === b.offset - b.iova;
}

export function sameRange(a: DmaRange, b: DmaRange): boolean {
  return a.iova === b.iova && a.size === b.size && sameBacking(a, b);
}

/** For messages to people: "[0x100000, 0x3fffff]". */
export function describe({ start, end }: Extent): string {
  return `[0x${start.toString(16)}, 0x${(end - 1).toString(16)}]`;
}
