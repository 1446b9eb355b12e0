import { memfd } from "../../../src/native/sys.ts";
import { type DirtyLog, LOG_BYTE, LOG_PAGE } from "../../../src/virtio/dirty-log.ts";

/** Pages that a 64-bit word of the log stands for: QEMU looks at so many at once. */
const WORD_PAGES = 64;

/**
 * A dirty log as a VMM shares it: a memfd with a bit for each page of guest memory. Not for files that a test makes shorter:
 * the log is mapped.
 */
export class FrontendDirtyLog implements DirtyLog, Disposable {
  readonly offset = 0;
  readonly size: number;
  private readonly file;
  private readonly words: BigUint64Array;

  /** @param end of guest memory, guest-physical, exclusive */
  constructor(end: number) {
    this.size = Math.ceil(end / (LOG_BYTE * LOG_PAGE)) * LOG_PAGE;
    this.file = memfd("dirty-log", this.size);
    this.words = new BigUint64Array(Bun.mmap(`/proc/self/fd/${this.file.number}`, { shared: true }).buffer);
  }

  get fd(): number {
    return this.file.number;
  }

  /** The pages that are marked, ascending, which they are not any more: each word is exchanged for 0. */
  take(): number[] {
    return this.pages((index) => Atomics.exchange(this.words, index, 0n));
  }

  /** The pages that are marked, ascending. */
  look(): number[] {
    return this.pages((index) => Atomics.load(this.words, index));
  }

  [Symbol.dispose](): void {
    this.file[Symbol.dispose]();
  }

  private pages(word: (index: number) => bigint): number[] {
    const pages: number[] = [];
    for (let index = 0; index < this.words.length; index++) {
      // A plain look first, as most words are 0.
      if (this.words[index] === 0n) continue;
      const bits = word(index);
      for (let bit = 0; bit < WORD_PAGES; bit++) {
        if ((bits >> BigInt(bit)) & 1n) pages.push(index * WORD_PAGES + bit);
      }
    }
    return pages;
  }
}
