import { Deadline } from "../base/deadline.ts";
import { DirtyLogMapping } from "../native/dirty-log.ts";
import { pread } from "../native/sys.ts";
import type { DmaRange } from "../pci/address-space.ts";
import { type DirtyLog, LOG_PAGE } from "../virtio/dirty-log.ts";

/**
 * A front-end that has not looked into its log by then never will. QEMU looks once in each pass over the memory of its
 * guest, and a last time when it stops the device; after a lost connection it does not look any more. Milliseconds.
 */
const PATIENCE = 600_000;

/** A dirty log in which every page of guest memory was marked, and what the front-end has seen of it. */
export class CompletedLog {
  /** The first and the last page of each region, where the front-end has not cleared them since. */
  private unseen: readonly number[] = [];
  private readonly deadline = Deadline.after(PATIENCE, "front-end that looks into its dirty log");

  /**
   * Marks all pages that the log has room for. Gives way to the event loop.
   * @throws SystemError where its file was made shorter
   */
  async mark(log: DirtyLog, ranges: readonly DmaRange[]): Promise<void> {
    using mapping = new DirtyLogMapping(log.fd, log.offset, log.size);
    for (const { iova, size } of ranges) {
      const first = iova / LOG_PAGE;
      const count = Math.min(size / LOG_PAGE, mapping.pages - first);
      if (count <= 0) continue;
      await mapping.markMany(first, count);
      this.unseen = [...this.unseen, first, first + count - 1];
    }
  }

  /** Other devices of the VM may mark the same pages again meanwhile: once seen is enough. */
  isSeen(log: DirtyLog): boolean {
    this.unseen = this.unseen.filter((page) => isMarked(log, page));
    return this.unseen.length === 0 || this.deadline.expired;
  }
}

/** Through the file, which may have been made shorter. */
function isMarked({ fd, offset }: DirtyLog, page: number): boolean {
  const byte = new Uint8Array(1);
  pread(fd, byte, offset + Math.floor(page / 8));
  return (byte[0]! & (1 << (page % 8))) !== 0;
}
