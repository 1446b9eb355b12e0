import { closeSync, constants, openSync, readSync } from "node:fs";

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

/** What the kernel has logged since this was made (Documentation/ABI/testing/dev-kmsg). */
export class KernelLog implements Disposable {
  private readonly fd: number;
  private readonly seen: string[] = [];

  constructor() {
    this.fd = openSync("/dev/kmsg", constants.O_RDONLY | constants.O_NONBLOCK);
    // Reading starts at the oldest record, and Bun has no seek: what was there before is read and dropped.
    this.read();
    this.seen.length = 0;
  }

  get lines(): readonly string[] {
    this.read();
    return this.seen;
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

/** "6,339,5140900,-;text\n key=value" → "text". */
function parseRecord(record: string): string {
  return record.slice(record.indexOf(";") + 1).split("\n")[0] ?? "";
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
