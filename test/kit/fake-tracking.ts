import {
  AdminStatus,
  PENDING_MAP_RESULT,
  REPORT_MAP_DATA,
  START_TRACKING_DATA,
  TRACKED_RANGE_DATA,
  TRACKING_IDENTITY_RESULT,
  TRACKING_MAP_PIECE,
  TrackingMode,
  type TrackingModeName,
} from "../../src/virtio/admin/vendor.ts";
import type { FakeAnswer, FakeCommand } from "./fake-admin.ts";
import type { FakeDma } from "./fake-dma.ts";
import { type FakeVf, refused } from "./fake-vf.ts";

/** Pages in one report, as powers of two: few, so that a test sees several. */
const LOG2_PAGES = { bitmap: 7, bytemap: 4 } as const;

/** What a VF notes of the pages that it writes, as it was told to. */
export class FakeTracking {
  /** Pages that are noted and not reported. */
  private readonly noted = new Set<number>();

  constructor(
    readonly mode: TrackingModeName,
    /** Bytes, guest-physical. */
    readonly range: { readonly address: number; readonly length: number },
    readonly pageSize: number,
    /** The map that it writes; in pull modes none. */
    readonly place: { readonly address: number; readonly length: number } | undefined,
  ) {}

  write(pages: readonly number[], dma: FakeDma): void {
    for (const page of pages) {
      if ((page + 1) * this.pageSize > this.range.length) throw new Error(`page ${page} is not tracked`);
      if (this.place === undefined) this.noted.add(page);
      else this.push(page, this.place, dma);
    }
  }

  get pending(): number {
    return this.noted.size === 0 ? 0 : this.mapSize;
  }

  /** @returns undefined where the map has no such part */
  report(offset: number, length: number): Uint8Array | undefined {
    const most = this.mode === "pullBitmap" ? 2 ** (LOG2_PAGES.bitmap - 3) : 2 ** LOG2_PAGES.bytemap;
    if (this.place !== undefined || length > most || offset + length > this.mapSize) return undefined;
    const bytes = new Uint8Array(length);
    for (const page of this.noted) {
      const at = (this.bits ? page >> 3 : page) - offset;
      if (at < 0 || at >= length) continue;
      bytes[at]! |= this.bits ? 1 << (page % 8) : 1;
      this.noted.delete(page);
    }
    return bytes;
  }

  private push(page: number, place: { readonly address: number; readonly length: number }, dma: FakeDma): void {
    const at = this.bits ? page >> 3 : page;
    if (at >= place.length) throw new Error(`page ${page} has no place in a map of ${place.length} bytes`);
    const [byte = 0] = dma.read(place.address + at, 1);
    dma.write(place.address + at, Uint8Array.of(byte | (this.bits ? 1 << (page % 8) : 1)));
  }

  private get bits(): boolean {
    return this.mode === "pushBitmap" || this.mode === "pullBitmap";
  }

  private get mapSize(): number {
    const pages = this.range.length / this.pageSize;
    return this.bits ? Math.ceil(pages / 8) : pages;
  }
}

/** What a device answers to the commands of class 65 that keeps to the rules. */
export function answerOfTracking(
  vfs: readonly FakeVf[],
  { name, vdevId, data }: FakeCommand,
  dma: FakeDma,
): FakeAnswer {
  if (name === "trackingIdentity") {
    const { bitmap, bytemap } = LOG2_PAGES;
    const limits = { log2PagesPullBitmap: bitmap, log2PagesPullBytemap: bytemap, rangesMax: 1 };
    return { status: 0, result: TRACKING_IDENTITY_RESULT.encode(limits) };
  }
  const vf = vfs[vdevId - 1];
  if (vf === undefined) return { status: refused(AdminStatus.error) };
  if (name === "startTracking") {
    const started = vf.tracking === undefined ? startOf(data, dma) : undefined;
    if (started === undefined) return { status: refused(AdminStatus.error) };
    vf.tracking = started;
    return { status: 0 };
  }
  const { tracking } = vf;
  const at = name === "reportMap" ? REPORT_MAP_DATA.read(data) : TRACKED_RANGE_DATA.read(data);
  if (tracking === undefined || Number(at.rangeAddress) !== tracking.range.address) {
    return { status: refused(AdminStatus.error) };
  }
  switch (name) {
    case "stopTracking":
      vf.tracking = undefined;
      return { status: 0 };
    case "pendingMap":
      return { status: 0, result: PENDING_MAP_RESULT.encode({ pending: BigInt(tracking.pending) }) };
    case "reportMap": {
      const { offset, length } = REPORT_MAP_DATA.read(data);
      const result = tracking.report(Number(offset), Number(length));
      return result === undefined ? { status: refused(AdminStatus.error) } : { status: 0, result };
    }
    default:
      return { status: refused(AdminStatus.invalidCommand) };
  }
}

/** undefined where it is malformed, or its map is not mapped. */
function startOf(data: Uint8Array, dma: FakeDma): FakeTracking | undefined {
  const { mode, pageSize, rangeAddress, rangeLength } = START_TRACKING_DATA.read(data);
  const names = Object.entries(TrackingMode) as [TrackingModeName, number][];
  const name = names.find(([, value]) => value === mode)?.[0];
  const pieces = (data.length - START_TRACKING_DATA.size) / TRACKING_MAP_PIECE.size;
  const pushes = name === "pushBitmap" || name === "pushBytemap";
  if (name === undefined || pieces !== (pushes ? 1 : 0) || Number(rangeLength) % pageSize !== 0) return undefined;
  const range = { address: Number(rangeAddress), length: Number(rangeLength) };
  if (!pushes) return new FakeTracking(name, range, pageSize, undefined);
  const piece = TRACKING_MAP_PIECE.read(data, START_TRACKING_DATA.size);
  const place = { address: Number(piece.address), length: piece.length };
  dma.read(place.address, place.length);
  return new FakeTracking(name, range, pageSize, place);
}
