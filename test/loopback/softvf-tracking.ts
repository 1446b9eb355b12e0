import { Deadline } from "../../src/base/deadline.ts";
import { fileInfo } from "../../src/native/sys.ts";
import {
  PENDING_MAP_RESULT,
  REPORT_MAP_DATA,
  START_TRACKING_DATA,
  TRACKED_RANGE_DATA,
  TRACKING_MAP_PIECE,
  TrackingMode,
  type TrackingModeName,
  vdevId,
} from "../../src/virtio/admin/vendor.ts";
import { GuestMemoryFile } from "../kit/guest-memory-file.ts";
import type { RawAdmin } from "./softvf-admin.ts";

export const PAGE = 4096;
/** In the PF's space. */
const MAP_BASE = 0x5_0000_0000;
const MAP_SIZE = 64 << 10;
const TIMEOUT = 5000;

export interface Range {
  readonly address: number;
  readonly length: number;
}

/** Memory of the PF where VFs mark pages. */
export class PushMap implements Disposable {
  readonly memory = new GuestMemoryFile(MAP_BASE, MAP_SIZE);

  private constructor(private readonly admin: RawAdmin) {}

  static async open(admin: RawAdmin): Promise<PushMap> {
    const map = new PushMap(admin);
    await map.map();
    return map;
  }

  async map(): Promise<void> {
    await this.admin.fn.dmaMap(this.range, this.memory.file.number, Deadline.after(TIMEOUT, "map"));
  }

  async unmap(): Promise<void> {
    await this.admin.fn.dmaUnmap(this.range, Deadline.after(TIMEOUT, "unmap"));
  }

  /** Reads and clears; nobody marks meanwhile. */
  take(): Uint8Array {
    const bytes = this.memory.read(MAP_BASE, MAP_SIZE);
    this.memory.write(MAP_BASE, new Uint8Array(MAP_SIZE));
    return bytes;
  }

  [Symbol.dispose](): void {
    this.memory[Symbol.dispose]();
  }

  private get range() {
    const { dev, ino } = fileInfo(this.memory.file.number);
    return { iova: MAP_BASE, size: MAP_SIZE, offset: 0, file: { dev, ino } };
  }
}

export function startData(
  vf: number,
  mode: TrackingModeName,
  { address, length }: Range,
  pieces: readonly (readonly [address: number, length: number])[] = [],
): Uint8Array {
  const head = START_TRACKING_DATA.encode({
    vdevId: vdevId(vf),
    mode: TrackingMode[mode],
    pageSize: PAGE,
    rangeAddress: BigInt(address),
    rangeLength: BigInt(length),
  });
  return Buffer.concat([
    head,
    ...pieces.map(([at, bytes]) => TRACKING_MAP_PIECE.encode({ address: BigInt(at), length: bytes })),
  ]);
}

export function trackedRange(vf: number, address: number): Uint8Array {
  return TRACKED_RANGE_DATA.encode({ vdevId: vdevId(vf), rangeAddress: BigInt(address) });
}

/** The pages that one VF writes, as an administrator has them tracked. */
export class Tracked {
  /** @param push where the VF marks them, in push modes; cleared by whoever reads */
  constructor(
    private readonly admin: RawAdmin,
    private readonly vf: number,
    private readonly mode: TrackingModeName,
    private readonly range: Range,
    private readonly push: PushMap,
  ) {}

  /** @returns the status byte */
  async start(): Promise<number> {
    // In two pieces: marks of one write may go to both.
    const pieces = this.pushes
      ? ([
          [MAP_BASE, 1],
          [MAP_BASE + 1, this.size - 1],
        ] as const)
      : [];
    return (await this.admin.tracking("startTracking", startData(this.vf, this.mode, this.range, pieces))).status;
  }

  /** @returns the status byte */
  async stop(): Promise<number> {
    return (await this.admin.tracking("stopTracking", trackedRange(this.vf, this.range.address))).status;
  }

  /** Bytes, or the negative status byte. */
  async pending(): Promise<number> {
    const { status, result } = await this.admin.tracking("pendingMap", trackedRange(this.vf, this.range.address), 8);
    return status === 0 ? Number(PENDING_MAP_RESULT.read(result).pending) : -status;
  }

  /** Guest addresses of the pages that were marked, which are clear then. In push modes while nobody marks. */
  async take(): Promise<number[]> {
    const map = this.pushes ? this.push.take() : await this.report();
    const bits = this.bitmap ? 8 : 1;
    const pages: number[] = [];
    for (const [at, byte] of map.entries()) {
      if (!this.bitmap && byte > 1) throw new Error(`byte ${at} of the map is ${byte}`);
      for (let bit = 0; bit < bits; bit++) if (((byte >> bit) & 1) !== 0) pages.push(at * bits + bit);
    }
    return pages.map((page) => this.range.address + page * PAGE);
  }

  private get pushes(): boolean {
    return this.mode === "pushBitmap" || this.mode === "pushBytemap";
  }

  private get bitmap(): boolean {
    return this.mode === "pushBitmap" || this.mode === "pullBitmap";
  }

  private get size(): number {
    const pages = this.range.length / PAGE;
    return this.bitmap ? Math.ceil(pages / 8) : pages;
  }

  /** In pieces. */
  private async report(): Promise<Uint8Array> {
    const size = await this.pending();
    const map = new Uint8Array(size);
    const step = 100;
    for (let offset = 0; offset < size; offset += step) {
      const length = Math.min(step, size - offset);
      const data = REPORT_MAP_DATA.encode({
        vdevId: vdevId(this.vf),
        offset: BigInt(offset),
        length: BigInt(length),
        rangeAddress: BigInt(this.range.address),
      });
      const { status, result } = await this.admin.tracking("reportMap", data, length);
      if (status !== 0) throw new Error(`report at ${offset}: status 0x${status.toString(16)}`);
      map.set(result, offset);
    }
    return map;
  }
}

/** Guest memory whose pages that were changed by anyone but its driver can be told. */
export class Witness {
  private known = new Uint8Array(0);

  constructor(private readonly memory: GuestMemoryFile) {
    const write = memory.write.bind(memory);
    memory.write = (gpa, bytes) => {
      write(gpa, bytes);
      if (this.known.length > 0) this.known.set(bytes, gpa - memory.gpa);
    };
  }

  /** From now on. Nothing else happens meanwhile. */
  begin(): void {
    this.known = this.memory.read(this.memory.gpa, this.memory.size);
  }

  /** Guest addresses. */
  changed(): number[] {
    const { gpa, size } = this.memory;
    const now = this.memory.read(gpa, size);
    const offsets = Array.from({ length: size / PAGE }, (_, page) => page * PAGE);
    const differs = (at: number) =>
      Buffer.compare(now.subarray(at, at + PAGE), this.known.subarray(at, at + PAGE)) !== 0;
    return offsets.filter(differs).map((at) => gpa + at);
  }
}
