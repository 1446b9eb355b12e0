import { readFile } from "node:fs/promises";
import { PciCommand, PciConfig } from "../../../src/virtio/registers.ts";
import type { Machine } from "./inside.ts";

/** QEMU's human monitor: a command line, and what it prints. */
type Monitor = (commandLine: string) => Promise<string>;

/** IOVAs that are translated one after the other. Bytes; `end` exclusive. */
export interface TranslatedRange {
  readonly start: number;
  readonly end: number;
}

/**
 * What the IOMMU lets a function reach, were it to master the bus: nothing, all memory of the machine (the kernel's own
 * domain where it is told to pass all through), or what is translated.
 */
export type Translation =
  | { readonly kind: "nothing" }
  | { readonly kind: "everything" }
  | { readonly kind: "ranges"; readonly ranges: readonly TranslatedRange[] };

/** Where the kernel says that the IOMMU has its registers. */
const REGISTERS = "/sys/class/iommu/dmar0/intel-iommu/address";
/** Registers of the IOMMU (VT-d specification, 11.4). */
const Register = { globalStatus: 0x1c, rootTable: 0x20 } as const;
const TRANSLATION_ENABLED = 0x8000_0000n;
/** Bits 10 and 11 of the root table's address: the mode; 0 is the legacy one (11.4.5). */
const TABLE_MODE = 0xc00n;
/** Entries of the root and of a context table are pairs of 64 bits (9.1, 9.3). */
const PAIR = 16;
const PRESENT = 1n;
/** Of an entry of a context table (9.3). */
const TRANSLATION_TYPE_SHIFT = 2n;
const TranslationType = { secondStage: 0n, passThrough: 2n } as const;
/** Address width 1 is three levels of tables, 2 is four. */
const LEVELS_BEYOND_WIDTH = 2;
/** Of an entry of a second-stage table (9.8). */
const READ_WRITE = 3n;
const LARGE_PAGE = 0x80n;
const ADDRESS = 0x000f_ffff_ffff_f000n;
const ENTRIES = 512;
const PAGE = 4096;
/** Walks of tables that change meanwhile. */
const TRIES = 100;

/**
 * The translation tables of the machine's IOMMU as the IOMMU itself sees them: read out of the machine's memory by the
 * QEMU that emulates both. No kernel interface is between, so it is the same for all kernels, and nothing of what is
 * asked can be wrong about what a function could reach.
 */
export class IommuView {
  private constructor(
    private readonly monitor: Monitor,
    /** Physical address of the registers. */
    private readonly registers: number,
  ) {}

  static async of(machine: Machine): Promise<IommuView> {
    const monitor = async (line: string) => `${await machine.qmp("human-monitor-command", { "command-line": line })}`;
    return new IommuView(monitor, Number.parseInt(await readFile(REGISTERS, "utf8"), 16));
  }

  /** What the IOMMU translates for a function, bus master or not. */
  async translation(address: string): Promise<Translation> {
    for (let tries = 0; tries < TRIES; tries++) {
      const tables = await this.tablesOf(address);
      if (typeof tables === "string") return { kind: tables };
      const ranges: TranslatedRange[] = [];
      const steady = await this.walk(tables.root, tables.levels, 0, (start, end) => {
        const last = ranges.at(-1);
        if (last?.end === start) ranges[ranges.length - 1] = { start: last.start, end };
        else ranges.push({ start, end });
      });
      if (!steady || !Bun.deepEquals(await this.tablesOf(address), tables)) continue;
      return ranges.length === 0 ? { kind: "nothing" } : { kind: "ranges", ranges };
    }
    throw new Error(`the tables of ${address} were others each of ${TRIES} times that they had been read`);
  }

  /**
   * What is translated for a function now, or would be as soon as it masters the bus. A function that nobody has open is in
   * the kernel's own domain, where all may be passed through; it reaches nothing as long as it cannot master the bus.
   */
  async reach(address: string): Promise<Translation> {
    for (;;) {
      const before = await isBusMaster(address);
      const translation = await this.translation(address);
      // One that was taken or let go while the tables were read may have been bus master and in that domain one after
      // the other.
      if ((await isBusMaster(address)) !== before) continue;
      return translation.kind === "everything" && !before ? { kind: "nothing" } : translation;
    }
  }

  /** Bytes of the machine's memory behind an IOVA, as the function reads them. @returns undefined where none is */
  async read(address: string, iova: number, length: 8 | 16): Promise<Uint8Array | undefined> {
    const tables = await this.tablesOf(address);
    if (typeof tables === "string") throw new Error(`${address} reaches ${tables}`);
    let { root: table, levels } = tables;
    for (; levels > 0; levels--) {
      const shift = 12 + 9 * (levels - 1);
      const index = Math.floor(iova / 2 ** shift) % ENTRIES;
      const [entry = 0n] = await this.words(table + index * 8, 1);
      if ((entry & READ_WRITE) === 0n) return undefined;
      table = Number(entry & ADDRESS);
      if (levels === 1 || (entry & LARGE_PAGE) !== 0n) {
        const words = await this.words(table + (iova % 2 ** shift), length / 8);
        return new Uint8Array(BigUint64Array.from(words).buffer);
      }
    }
    return undefined;
  }

  private async tablesOf(address: string): Promise<"nothing" | "everything" | { root: number; levels: number }> {
    const [status = 0n] = await this.words(this.registers + Register.globalStatus, 1, "w");
    if ((status & TRANSLATION_ENABLED) === 0n) return "everything";
    const [root = 0n] = await this.words(this.registers + Register.rootTable, 1);
    if ((root & TABLE_MODE) !== 0n) throw new Error(`the root table is of another mode: 0x${root.toString(16)}`);
    const [, bus = 0, device = 0, fn = 0] = address.split(/[:.]/).map((part) => Number.parseInt(part, 16));
    const [rootEntry = 0n] = await this.words(Number(root & ADDRESS) + bus * PAIR, 2);
    if ((rootEntry & PRESENT) === 0n) return "nothing";
    const place = Number(rootEntry & ADDRESS) + (device * 8 + fn) * PAIR;
    const [low = 0n, high = 0n] = await this.words(place, 2);
    if ((low & PRESENT) === 0n) return "nothing";
    const type = (low >> TRANSLATION_TYPE_SHIFT) & 3n;
    if (type === TranslationType.passThrough) return "everything";
    if (type !== TranslationType.secondStage) throw new Error(`${address} has a translation of type ${type}`);
    return { root: Number(low & ADDRESS), levels: Number(high & 7n) + LEVELS_BEYOND_WIDTH };
  }

  /**
   * @returns false where a table was taken out of the tree while it was read: it may have been anything by then. The kernel
   * clears what leads to a table before it gives the table back
   */
  private async walk(
    table: number,
    level: number,
    base: number,
    found: (start: number, end: number) => void,
  ): Promise<boolean> {
    const size = PAGE * ENTRIES ** (level - 1);
    const entries = await this.tryWords(table, ENTRIES);
    if (entries === undefined) return false;
    const below: number[] = [];
    for (const [index, entry] of entries.entries()) {
      if ((entry & READ_WRITE) === 0n) continue;
      const start = base + index * size;
      if (level === 1 || (entry & LARGE_PAGE) !== 0n) {
        found(start, start + size);
        continue;
      }
      below.push(index);
      if (!(await this.walk(Number(entry & ADDRESS), level - 1, start, found))) return false;
    }
    if (below.length === 0) return true;
    const now = await this.tryWords(table, ENTRIES);
    return (
      now !== undefined && below.every((index) => ((now[index]! ^ entries[index]!) & (ADDRESS | READ_WRITE)) === 0n)
    );
  }

  /** Little-endian words of physical memory. "g": of 8 bytes, "w": of 4. */
  private async words(address: number, count: number, unit: "g" | "w" = "g"): Promise<bigint[]> {
    const words = await this.tryWords(address, count, unit);
    if (words === undefined) throw new Error(`the machine has no memory at 0x${address.toString(16)}`);
    return words;
  }

  /** undefined where the machine has no memory there. */
  private async tryWords(address: number, count: number, unit: "g" | "w" = "g"): Promise<bigint[] | undefined> {
    const text = await this.monitor(`xp /${count}${unit}x 0x${address.toString(16)}`);
    if (text.includes("Cannot access memory")) return undefined;
    const words = text
      .split("\n")
      .flatMap((line) => line.slice(line.indexOf(":") + 1).match(/0x[0-9a-f]+/g) ?? [])
      .map(BigInt);
    if (words.length !== count) throw new Error(`QEMU's monitor said ${JSON.stringify(text.slice(0, 200))}`);
    return words;
  }
}

/** Whether a function may reach memory at all, as its configuration space says. */
export async function isBusMaster(address: string): Promise<boolean> {
  const bytes = await readFile(`/sys/bus/pci/devices/${address}/config`);
  return (bytes.readUInt16LE(PciConfig.command) & PciCommand.busMaster) !== 0;
}
