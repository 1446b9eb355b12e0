import { VhostdError } from "../../base/errors.ts";
import { Mapping } from "../../native/mmio.ts";
import type { AccessWidth, RegisterSpace } from "../function.ts";
import { type DeviceAccesses, pieces, putValue } from "./accesses.ts";
import type { MappableArea, RegionPlace } from "./device.ts";
import type { AccessGate } from "./gate.ts";

/** The file of a function's device, as far as its regions are concerned. */
export interface DeviceFile {
  /** Borrowed. */
  readonly number: number;
  /** Bytes: the unit of its mappings. */
  readonly pageSize: number;
  readonly gate: AccessGate;
  /** For what is not reached by a mapping. */
  readonly accesses: DeviceAccesses;
}

/** A mapping and where in the region it begins. */
interface MappedArea extends MappableArea {
  readonly mapping: Mapping;
}

/**
 * One region of a function: by its mapping where it has one, by reading and writing the device's file on a thread
 * elsewhere (configuration space, I/O ports, what surrounds an MSI-X table of an old kernel, a function that was lent).
 */
export class VfioRegion implements RegisterSpace, Disposable {
  private mapped: readonly MappedArea[];

  /**
   * @param access "by file" where it is not to be mapped
   * @throws SystemError where it cannot be mapped
   */
  constructor(
    /** "BAR 4 of 0000:5a:00.1", for messages. */
    readonly name: string,
    private readonly file: DeviceFile,
    readonly place: RegionPlace,
    access: "mapped" | "by file",
  ) {
    using undo = new DisposableStack();
    const areas = access === "mapped" ? place.areas : [];
    this.mapped = areas.map(({ offset, size }) => {
      const mapping = undo.use(Mapping.map(file.number, place.fileOffset + offset, size, "read-write"));
      return { offset, size, mapping };
    });
    undo.move();
  }

  get size(): number {
    return this.place.size;
  }

  read(offset: number, width: AccessWidth): Promise<number> {
    return this.access("read", offset, width, width, () => {
      const area = this.directArea(offset, width);
      return area === undefined
        ? this.file.accesses.make({ offset: this.place.fileOffset + offset, width })
        : readMapped(area, offset, width);
    });
  }

  write(offset: number, width: AccessWidth, value: number): Promise<void> {
    return this.access<void>("write", offset, width, width, () => {
      const area = this.directArea(offset, width);
      if (area !== undefined) return writeMapped(area, offset, width, value);
      return this.file.accesses.make({ offset: this.place.fileOffset + offset, width, value }).then(() => {});
    });
  }

  readBytes(offset: number, length: number): Promise<Uint8Array> {
    return this.access("read", offset, length, 1, () => {
      const area = this.directArea(offset, length);
      if (area === undefined) return this.file.accesses.readBytes(this.place.fileOffset + offset, length);
      const bytes = new Uint8Array(length);
      for (const piece of pieces(offset, length)) {
        putValue(bytes, piece, readMapped(area, piece.offset, piece.width), offset);
      }
      return bytes;
    });
  }

  /** The kernel lets `width` bytes at `offset` be mapped. */
  isMappable(offset: number, width: number): boolean {
    return this.place.areas.some((area) => isInside(area, offset, width));
  }

  /** The mapping that has `width` bytes at `offset`, and where in it they are; undefined where none has. */
  mappingAt(offset: number, width: number): { readonly mapping: Mapping; readonly offset: number } | undefined {
    const area = this.areaAt(offset, width);
    return area === undefined ? undefined : { mapping: area.mapping, offset: offset - area.offset };
  }

  /** By its file only from now on. */
  unmap(): void {
    for (const { mapping } of this.mapped) mapping[Symbol.dispose]();
    this.mapped = [];
  }

  [Symbol.dispose](): void {
    this.unmap();
  }

  private access<T>(
    what: "read" | "write",
    offset: number,
    length: number,
    alignment: number,
    body: () => T | Promise<T>,
  ): Promise<T> {
    return this.file.gate.pass(async () => {
      const where = `${length} bytes at 0x${offset.toString(16)} of ${this.name}`;
      if (!Number.isInteger(offset) || offset < 0 || !(length >= 0) || offset + length > this.size) {
        throw new VhostdError("barRead", `${where}, which has ${this.size}`);
      }
      try {
        if (offset % alignment !== 0) throw new VhostdError("invalid", `the offset is no multiple of ${alignment}`);
        return await body();
      } catch (cause) {
        // It was closed meanwhile.
        if (cause instanceof VhostdError && cause.code === "cancelled") throw cause;
        throw new VhostdError("barRead", `cannot ${what} ${where}`, {
          fix: "look in the kernel log whether the device was lost, or its memory was switched off",
          cause,
        });
      }
    });
  }

  /** Where an access is made at once: no earlier one is still on its way through the file. */
  private directArea(offset: number, length: number): MappedArea | undefined {
    return this.file.accesses.idle ? this.areaAt(offset, length) : undefined;
  }

  private areaAt(offset: number, length: number): MappedArea | undefined {
    return this.mapped.find((area) => isInside(area, offset, length));
  }
}

function isInside(area: MappableArea, offset: number, length: number): boolean {
  return offset >= area.offset && offset + length <= area.offset + area.size;
}

function readMapped({ mapping, offset: begin }: MappedArea, offset: number, width: AccessWidth): number {
  const at = offset - begin;
  if (width === 1) return mapping.read8(at);
  return width === 2 ? mapping.read16(at) : mapping.read32(at);
}

function writeMapped({ mapping, offset: begin }: MappedArea, offset: number, width: AccessWidth, value: number): void {
  const at = offset - begin;
  if (width === 1) mapping.write8(at, value);
  else if (width === 2) mapping.write16(at, value);
  else mapping.write32(at, value);
}
