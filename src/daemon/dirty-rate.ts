import { DirtyLogMapping } from "../native/dirty-log.ts";
import type { DirtyLog } from "../virtio/dirty-log.ts";

/** Milliseconds between two looks, at least. */
const INTERVAL = 1000;
/** A look takes at most this part of the time: the log of a VM with much memory is looked at less often. */
const SHARE = 1 / 50;

/** What a dirty log looked like the last time. */
export type DirtyPages = {
  /** Marked, of 4096 bytes each. */
  readonly pages: number;
  /** At least so many were marked in a second since the look before. */
  readonly pages_per_second: number;
};

/** How many pages are marked in a front-end's log, and how fast they become more. Looks about once a second. */
export class DirtyRate implements Disposable {
  private readonly mapping: DirtyLogMapping;
  private seen: { readonly at: number; readonly found: DirtyPages } | undefined;
  private timer: ReturnType<typeof setTimeout> | undefined;
  private stopped = false;

  /**
   * @param log its fd is borrowed for the call
   * @throws SystemError
   */
  constructor(
    { fd, offset, size }: DirtyLog,
    private readonly now = () => performance.now(),
  ) {
    this.mapping = new DirtyLogMapping(fd, offset, size);
    this.schedule(INTERVAL);
  }

  /** Null before the first look, and where the log cannot be read any more. */
  get found(): DirtyPages | null {
    return this.seen?.found ?? null;
  }

  /** Gives way to the event loop. Never rejects. */
  async look(): Promise<void> {
    const began = this.now();
    try {
      const pages = await this.mapping.count();
      const { seen } = this;
      const seconds = seen === undefined ? 0 : (began - seen.at) / 1000;
      // With fewer than before it was cleared meanwhile: those that are there were marked since, and maybe more.
      const more = seen === undefined || pages < seen.found.pages ? pages : pages - seen.found.pages;
      const rate = seconds > 0 ? Math.round(more / seconds) : 0;
      this.seen = { at: began, found: { pages, pages_per_second: rate } };
      this.schedule(Math.max(INTERVAL, (this.now() - began) / SHARE));
    } catch {
      // Its file was made shorter, or nobody wants to know any more.
      this.seen = undefined;
    }
  }

  [Symbol.dispose](): void {
    this.stopped = true;
    clearTimeout(this.timer);
    this.mapping[Symbol.dispose]();
  }

  /** The process does not stay for it. */
  private schedule(milliseconds: number): void {
    clearTimeout(this.timer);
    if (this.stopped) return;
    this.timer = setTimeout(() => void this.look(), milliseconds);
    this.timer.unref();
  }
}
