import { existsSync, readFileSync } from "node:fs";
import { SystemError } from "../base/errors.ts";

/**
 * How much guest memory the functions of this process may have mapped. All of them share one address space and the
 * kernel's limit of mappings: a client that took all of either would end the service of the others, and the process.
 */

interface Amounts {
  readonly bytes: number;
  readonly ranges: number;
}

/** The most that one function may have, however few there are. */
export const MEMORY_LIMITS: Amounts = { bytes: 4 * 2 ** 40, ranges: 4096 };
/** What one may ask for, however many there are: enough for a guest. The process-wide limit still holds. */
const LEAST: Amounts = { bytes: 64 * 2 ** 30, ranges: 64 };
/** Half of the 47 bits that programs have on x86-64, and half of the mappings: engine, threads and files need some. */
const PROCESS: Amounts = { bytes: 64 * 2 ** 40, ranges: Math.floor(mostMappings() / 2) };

const ENOSPC = 28;

const shares = new Set<MemoryShare>();

/** One function's part of it, from its construction to its disposal. */
export class MemoryShare implements Disposable {
  private bytes = 0;
  private ranges = 0;

  constructor() {
    shares.add(this);
  }

  /** What this function may have now: the fewer functions, the more. */
  get limits(): Amounts {
    const part = (kind: keyof Amounts) =>
      Math.min(MEMORY_LIMITS[kind], Math.max(LEAST[kind], Math.floor(PROCESS[kind] / shares.size)));
    return { bytes: part("bytes"), ranges: part("ranges") };
  }

  /** One more range. @throws SystemError ENOSPC with the limit */
  take(bytes: number): void {
    const { limits } = this;
    check(this.ranges + 1, limits.ranges, "DMA ranges of this function");
    check(this.bytes + bytes, limits.bytes, "bytes of memory of this function");
    const total = (kind: keyof Amounts) => [...shares].reduce((sum, share) => sum + share[kind], 0);
    check(total("ranges") + 1, PROCESS.ranges, "DMA ranges of all functions");
    check(total("bytes") + bytes, PROCESS.bytes, "bytes of memory of all functions");
    this.ranges++;
    this.bytes += bytes;
  }

  /** A range is unmapped. */
  give(bytes: number): void {
    this.ranges--;
    this.bytes -= bytes;
  }

  giveAll(): void {
    this.ranges = this.bytes = 0;
  }

  [Symbol.dispose](): void {
    shares.delete(this);
  }
}

function check(wanted: number, limit: number, what: string): void {
  if (wanted > limit) throw new SystemError(`${wanted} ${what}; at most ${limit}`, ENOSPC);
}

function mostMappings(): number {
  const file = "/proc/sys/vm/max_map_count";
  return existsSync(file) ? Number(readFileSync(file, "utf8")) : 65530;
}
