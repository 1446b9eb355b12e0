import { VhostdError } from "../base/errors.ts";
import { checkFd, checkInteger, checkSize } from "./arguments.ts";
import { c, check } from "./load.ts";
import { fileInfo } from "./sys.ts";

/** Bytes of a log, and pages of a map, that are gone through at a time, about a millisecond's work. */
const PIECE = 1 << 20;

/** How a map says which pages were written: a bit each, or a byte each that is not 0. */
export type MapForm = "bitmap" | "bytemap";

/** Bytes of map for so many pages. */
export function mapBytes(form: MapForm, pages: number): number {
  return form === "bitmap" ? Math.ceil(pages / 8) : pages;
}

/** A shared mapping of a file that is no longer than the file, so that nothing behind it is touched. */
class SharedBytes implements Disposable {
  private held: number | undefined;
  /** What the kernel has made of the size: whole pages, also where they are huge, of which it unmaps no parts. */
  private readonly mapped: number;

  constructor(
    fd: number,
    offset: number,
    /** Bytes. */
    readonly size: number,
  ) {
    checkSize(offset, "offset of a mapping");
    checkInteger(size, 1, Number.MAX_SAFE_INTEGER, "size of a mapping");
    const { pageSize } = fileInfo(fd);
    this.mapped = Math.ceil(size / pageSize) * pageSize;
    this.held = check(c.vhostd_map(checkFd(fd), offset, size, 1), "mmap");
  }

  get address(): number {
    if (this.held === undefined) throw new VhostdError("invalid", "mapping is used after it was disposed of");
    return this.held;
  }

  [Symbol.dispose](): void {
    if (this.held === undefined) return;
    c.vhostd_unmap(this.held, this.mapped);
    this.held = undefined;
  }
}

/** A map with a byte for each page, which a device writes: memory of our own. */
export class Bytemap implements Disposable {
  private readonly bytes: SharedBytes;

  /**
   * The fd is borrowed for the call.
   * @param pages from the begin of the file on
   * @throws SystemError
   */
  constructor(
    fd: number,
    readonly pages: number,
  ) {
    this.bytes = new SharedBytes(fd, 0, pages);
  }

  get address(): number {
    return this.bytes.address;
  }

  [Symbol.dispose](): void {
    this.bytes[Symbol.dispose]();
  }
}

/**
 * A front-end's dirty log in this process: bit n of byte n / 8 is page n. The front-end reads and clears it meanwhile, so
 * each page is marked by an atomic OR. All throw SystemError EFAULT where its file was made shorter.
 */
export class DirtyLogMapping implements Disposable {
  private readonly bytes: SharedBytes;

  /**
   * The fd is borrowed for the call.
   * @param offset bytes, a multiple of the page size
   * @param size bytes
   * @throws SystemError
   */
  constructor(fd: number, offset: number, size: number) {
    this.bytes = new SharedBytes(fd, offset, size);
  }

  /** Pages that it has a bit for. */
  get pages(): number {
    return 8 * this.bytes.size;
  }

  /** @throws VhostdError invalid where it has no bit for one of them; SystemError */
  mark(firstPage: number, count: number): void {
    this.checkPages(firstPage, count);
    check(c.vhostd_log_mark(this.bytes.address, firstPage, count), "marking in a dirty log");
  }

  /**
   * The same for any number of pages. Gives way to the event loop.
   * @throws VhostdError invalid where it has no bit for one of them; SystemError
   */
  async markMany(firstPage: number, count: number): Promise<void> {
    this.checkPages(firstPage, count);
    const end = firstPage + count;
    for (let page = firstPage; page < end; page += 8 * PIECE) {
      if (page > firstPage) await nextTurn();
      this.mark(page, Math.min(8 * PIECE, end - page));
    }
  }

  /**
   * Marks what is marked in `bytes`, whose first page is `firstPage`, in a bitmap a multiple of 8.
   * @throws VhostdError invalid where it has no bit for one of the pages; SystemError
   */
  merge(firstPage: number, bytes: Uint8Array, form: MapForm): void {
    this.checkPages(firstPage, form === "bitmap" ? 8 * bytes.length : bytes.length);
    if (bytes.length === 0) return;
    const { address } = this.bytes;
    if (form === "bitmap") {
      if (firstPage % 8 !== 0) throw new VhostdError("invalid", `page ${firstPage} begins no byte of a bitmap`);
      check(c.vhostd_log_merge_bitmap(address + firstPage / 8, bytes, bytes.length), "marking in a dirty log");
    } else {
      check(c.vhostd_log_merge_bytemap(address, firstPage, bytes, bytes.length), "marking in a dirty log");
    }
  }

  /**
   * Marks what is marked in `map`, from page 0 on, and clears it there: by an exchange of each byte, because the device
   * goes on writing. Gives way to the event loop.
   * @throws VhostdError invalid where it has no bit for one of the pages; SystemError
   */
  async take(map: Bytemap): Promise<void> {
    this.checkPages(0, map.pages);
    for (let page = 0; page < map.pages; page += PIECE) {
      if (page > 0) await nextTurn();
      const count = Math.min(PIECE, map.pages - page);
      const result = c.vhostd_log_take_bytemap(this.bytes.address, page, map.address + page, count);
      check(result, "marking in a dirty log");
    }
  }

  /** How many pages are marked now. Gives way to the event loop. @throws SystemError */
  async count(): Promise<number> {
    let marked = 0;
    for (let at = 0; at < this.bytes.size; at += PIECE) {
      if (at > 0) await nextTurn();
      const length = Math.min(PIECE, this.bytes.size - at);
      marked += check(c.vhostd_log_count(this.bytes.address + at, length), "reading a dirty log");
    }
    return marked;
  }

  [Symbol.dispose](): void {
    this.bytes[Symbol.dispose]();
  }

  private checkPages(first: number, count: number): void {
    checkInteger(first, 0, this.pages, "first page of a dirty log");
    checkInteger(count, 0, this.pages - first, "count of pages of a dirty log");
  }
}

function nextTurn(): Promise<void> {
  return new Promise((resolve) => setImmediate(resolve));
}
