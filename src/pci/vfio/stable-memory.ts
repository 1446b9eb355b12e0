import type { OwnedFd } from "../../native/fd.ts";
import { Mapping } from "../../native/mmio.ts";
import { memfd, pread, pwrite } from "../../native/sys.ts";

/** Zeroed memory whose address does not change, for structures that point to others. */
export class StableMemory implements Disposable {
  private readonly undo: DisposableStack;
  private readonly file: OwnedFd;
  /** In this process. */
  readonly address: number;

  /** @param size bytes. @throws SystemError */
  constructor(private readonly size: number) {
    using undo = new DisposableStack();
    this.file = undo.use(memfd("ioctl-argument", size));
    const mapping = undo.use(Mapping.map(this.file.number, 0, size, "read-write"));
    const lent = mapping.lend(0, 1);
    undo.defer(lent.release);
    this.address = lent.address;
    this.undo = undo.move();
  }

  write(bytes: Uint8Array): void {
    pwrite(this.file.number, bytes, 0);
  }

  read(): Uint8Array {
    const bytes = new Uint8Array(this.size);
    pread(this.file.number, bytes, 0);
    return bytes;
  }

  [Symbol.dispose](): void {
    this.undo.dispose();
  }
}
