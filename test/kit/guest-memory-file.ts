import { VhostdError } from "../../src/base/errors.ts";
import { duplicate, type OwnedFd } from "../../src/native/fd.ts";
import { memfd, pread, pwrite } from "../../src/native/sys.ts";
import type { RingMemory } from "../../src/virtio/split-ring.ts";

/** Guest memory as a driver uses it. Addresses are guest-physical, lengths bytes. */
export interface DriverMemory extends RingMemory {
  write(gpa: number, bytes: Uint8Array): void;
}

/**
 * One region of guest memory, a memfd of its own. It is read and written by system calls: nothing of a test's
 * process is mapped, so a test may shrink the file too.
 */
export class GuestMemoryFile implements DriverMemory, Disposable {
  /**
   * @param gpa where the region lies in guest-physical space
   * @param size bytes
   * @param file of that size
   */
  constructor(
    readonly gpa: number,
    readonly size: number,
    readonly file: OwnedFd = memfd("guest-memory", size),
  ) {}

  /** The same memory, as another connection of its VMM has it. */
  share(): GuestMemoryFile {
    return new GuestMemoryFile(this.gpa, this.size, duplicate(this.file.number));
  }

  read(gpa: number, length: number): Uint8Array<ArrayBuffer> {
    const bytes = new Uint8Array(length);
    const done = length === 0 ? 0 : pread(this.file.number, bytes, this.offset(gpa, length));
    if (done !== length) throw new VhostdError("badAddress", `guest memory ends before ${length} bytes at ${hex(gpa)}`);
    return bytes;
  }

  write(gpa: number, bytes: Uint8Array): void {
    if (bytes.length === 0) return;
    const done = pwrite(this.file.number, bytes, this.offset(gpa, bytes.length));
    if (done !== bytes.length)
      throw new VhostdError("badAddress", `guest memory took ${done} of ${bytes.length} bytes`);
  }

  [Symbol.dispose](): void {
    this.file[Symbol.dispose]();
  }

  private offset(gpa: number, length: number): number {
    if (gpa < this.gpa || gpa + length > this.gpa + this.size) {
      throw new VhostdError(
        "badAddress",
        `${length} bytes at ${hex(gpa)} are outside ${hex(this.gpa)}+${hex(this.size)}`,
      );
    }
    return gpa - this.gpa;
  }
}

function hex(value: number): string {
  return `0x${value.toString(16)}`;
}
