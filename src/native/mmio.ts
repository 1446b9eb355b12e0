import { VhostdError } from "../base/errors.ts";
import { checkFd, checkInteger, checkSize } from "./arguments.ts";
import { c, check } from "./load.ts";

/**
 * A shared mapping of a file or of a device's registers. Each access is one volatile access of its exact width, in
 * native code. Values are little-endian as the machine is (x86-64, aarch64).
 */
export class Mapping implements Disposable {
  private address: number | undefined;
  /** Who uses the address in native code: the mapping stays until all have let go. */
  private users = 0;
  private disposed = false;

  private constructor(
    address: number,
    /** Bytes. */
    readonly size: number,
    private readonly access: "read" | "read-write",
  ) {
    this.address = address;
  }

  /**
   * Maps `size` bytes from `offset`, a multiple of the page size. The fd is borrowed for the call.
   * @throws SystemError
   */
  static map(fd: number, offset: number, size: number, access: "read" | "read-write"): Mapping {
    checkSize(offset, "offset of a mapping");
    checkInteger(size, 1, Number.MAX_SAFE_INTEGER, "size of a mapping");
    return new Mapping(check(c.vhostd_map(checkFd(fd), offset, size, access === "read" ? 0 : 1), "mmap"), size, access);
  }

  /** @throws VhostdError invalid out of bounds or misaligned; SystemError EFAULT where the memory is gone */
  read8(offset: number): number {
    return check(c.vhostd_read8(this.at(offset, 1)), "read of mapped memory");
  }

  /** As read8. */
  read16(offset: number): number {
    return check(c.vhostd_read16(this.at(offset, 2)), "read of mapped memory");
  }

  /** As read8. */
  read32(offset: number): number {
    return check(c.vhostd_read32(this.at(offset, 4)), "read of mapped memory");
  }

  /** @throws as read8 */
  write8(offset: number, value: number): void {
    check(c.vhostd_write8(this.writableAt(offset, 1), checkInteger(value, 0, 0xff, "value")), "write to mapped memory");
  }

  /** @throws as read8 */
  write16(offset: number, value: number): void {
    const address = this.writableAt(offset, 2);
    check(c.vhostd_write16(address, checkInteger(value, 0, 0xffff, "value")), "write to mapped memory");
  }

  /** @throws as read8 */
  write32(offset: number, value: number): void {
    const address = this.writableAt(offset, 4);
    check(c.vhostd_write32(address, checkInteger(value, 0, 0xffff_ffff, "value")), "write to mapped memory");
  }

  /**
   * For native code that writes `width` bytes at `offset` by itself: the address, good until `release` is called once.
   * @throws as read8
   */
  lend(offset: number, width: 1 | 2 | 4): { readonly address: number; release(): void } {
    const address = this.writableAt(offset, width);
    this.users++;
    return {
      address,
      release: () => {
        this.users--;
        this.unmapUnused();
      },
    };
  }

  private at(offset: number, width: number): number {
    if (this.address === undefined || this.disposed) {
      throw new VhostdError("invalid", "mapping is used after it was disposed of");
    }
    checkInteger(offset, 0, this.size - width, "offset in a mapping");
    if (offset % width !== 0) throw new VhostdError("invalid", `offset ${offset} is no multiple of ${width}`);
    return this.address + offset;
  }

  private writableAt(offset: number, width: number): number {
    if (this.access === "read") throw new VhostdError("invalid", "mapping is for reading only");
    return this.at(offset, width);
  }

  private unmapUnused(): void {
    if (!this.disposed || this.users > 0 || this.address === undefined) return;
    c.vhostd_unmap(this.address, this.size);
    this.address = undefined;
  }

  /**
   * As disposing of it, one part after the other, with a turn of the event loop in between: to unmap a gigabyte of small
   * pages that are present takes some 20 ms.
   * @param part bytes, a multiple of the file's page size
   */
  async unmapInParts(part: number): Promise<void> {
    this.disposed = true;
    if (this.users > 0 || this.address === undefined) return;
    const { address, size } = this;
    this.address = undefined;
    for (let at = 0; at < size; at += part) {
      if (at > 0) await new Promise((resolve) => setImmediate(resolve));
      c.vhostd_unmap(address + at, Math.min(part, size - at));
    }
  }

  /**
   * The pages that the kernel has brought into this process are not counted as its own any more: they stay in the file, and
   * pinned where they are. In parts, as `unmapInParts`.
   */
  async disownInParts(part: number): Promise<void> {
    for (let at = 0; at < this.size; at += part) {
      if (at > 0) await new Promise((resolve) => setImmediate(resolve));
      // Only accounting depends on it: kernels before 5.18 refuse it for huge pages.
      if (this.address !== undefined) c.vhostd_disown(this.address + at, Math.min(part, this.size - at));
    }
  }

  /** No access from here on. Unmapped at once, or when the last relay connection to it is gone. */
  [Symbol.dispose](): void {
    this.disposed = true;
    this.unmapUnused();
  }
}
