import { closeSync, constants, openSync, readFileSync, readSync } from "node:fs";
import type { Deadline } from "../../../src/base/deadline.ts";

/** A DMA that the IOMMU has refused. */
export interface DmaFault {
  readonly operation: "read" | "write";
  /** "0000:01:00.0". */
  readonly address: string;
  readonly iova: bigint;
  /** As in the specification of Intel VT-d, table "Fault reason encodings". */
  readonly reason: number;
}

/** Longest record of the kernel (PRINTKRB_RECORD_MAX, CONSOLE_EXT_LOG_MAX). */
const RECORD = 8192;
const FAULT =
  /\[DMA (Read|Write)[^\]]*\] Request device \[(?:([0-9a-f]+):)?([0-9a-f]{2}:[0-9a-f]{2}\.[0-7])\].*fault addr (0x[0-9a-f]+) \[fault reason (0x[0-9a-f]+)\]/;

/** A line, and when it was logged: seconds since the kernel started. */
interface Line {
  readonly at: number;
  readonly text: string;
}

/**
 * The kernel looks whether it may log (printk_ratelimit) ten times in five seconds, and drops what is beyond: for each
 * interrupt of the IOMMU, for each fault, and once more behind the last one (dmar_fault in drivers/iommu/intel/dmar.c).
 */
const LIMIT = { looks: 10, seconds: 5.5 };
const INTERRUPT = /DRHD: handling fault status/;
/** For an interrupt with one fault. */
const LOOKS = 3;

/** What the kernel has logged since this was made (Documentation/ABI/testing/dev-kmsg). */
export class KernelLog implements Disposable {
  private readonly fd: number;
  private readonly seen: Line[] = [];

  constructor() {
    this.fd = openSync("/dev/kmsg", constants.O_RDONLY | constants.O_NONBLOCK);
    // Reading starts at the oldest record, and Bun has no seek: what was there before is read and dropped.
    this.read();
    this.seen.length = 0;
  }

  get lines(): readonly string[] {
    this.read();
    return this.seen.map(({ text }) => text);
  }

  /** Waits until a DMA fault would be logged: many of them in a short time are not. @throws VhostdError timedOut */
  async roomForFault(deadline: Deadline): Promise<void> {
    await deadline.poll(() => {
      this.read();
      const from = Number(readFileSync("/proc/uptime", "utf8").split(" ")[0]) - LIMIT.seconds;
      const recent = this.seen.filter(({ at }) => at >= from).map(({ text }) => text);
      const interrupts = recent.filter((text) => INTERRUPT.test(text)).length;
      const faults = recent.filter((text) => parseDmaFault(text) !== undefined).length;
      return 2 * interrupts + faults + LOOKS <= LIMIT.looks || undefined;
    }, 50);
  }

  /** Those that were logged; the kernel drops some where there are very many. */
  dmaFaults(): DmaFault[] {
    return this.lines.map(parseDmaFault).filter((fault) => fault !== undefined);
  }

  [Symbol.dispose](): void {
    closeSync(this.fd);
  }

  private read(): void {
    const buffer = Buffer.alloc(RECORD);
    for (;;) {
      try {
        const length = readSync(this.fd, buffer, 0, RECORD, null);
        this.seen.push(parseRecord(buffer.toString("utf8", 0, length)));
      } catch (error) {
        const { code } = error as NodeJS.ErrnoException;
        if (code === "EAGAIN") return;
        // Records that were overwritten before they were read: the next read goes on behind them.
        if (code !== "EPIPE") throw error;
      }
    }
  }
}

/** "6,339,5140900,-;text\n key=value" → 5.1409 and "text". */
function parseRecord(record: string): Line {
  const [prefix = "", text = ""] = record.split("\n")[0]!.split(/;(.*)/s);
  return { at: Number(prefix.split(",")[2]) / 1e6, text };
}

/** A line of drivers/iommu/intel/dmar.c. */
export function parseDmaFault(line: string): DmaFault | undefined {
  const [, operation, domain = "0000", device, iova, reason] = FAULT.exec(line) ?? [];
  if (operation === undefined || iova === undefined || reason === undefined) return undefined;
  return {
    operation: operation === "Read" ? "read" : "write",
    address: `${domain}:${device}`,
    iova: BigInt(iova),
    reason: Number(reason),
  };
}
