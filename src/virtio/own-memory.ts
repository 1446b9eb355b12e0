import { VhostdError } from "../base/errors.ts";
import type { OwnedFd } from "../native/fd.ts";
import { fileInfo, memfd, pread, pwrite, sealSize } from "../native/sys.ts";
import type { DmaDomain } from "../pci/dma-domain.ts";

/**
 * Memory of the daemon's own that a function reaches at `iova`: rings and buffers that belong to no guest. It is read
 * and written by system calls only: there is no mapping that the next process would have to make again.
 */
export class OwnMemory implements Disposable {
  constructor(
    readonly file: OwnedFd,
    readonly iova: number,
  ) {}

  /** @throws VhostdError io where the file has become shorter */
  read(offset: number, length: number): Uint8Array<ArrayBuffer> {
    const bytes = new Uint8Array(length);
    if (length > 0 && pread(this.file.number, bytes, offset) !== length) throw shrunk();
    return bytes;
  }

  /** @throws VhostdError io */
  write(offset: number, bytes: Uint8Array): void {
    if (bytes.length > 0 && pwrite(this.file.number, bytes, offset) !== bytes.length) throw shrunk();
  }

  /** @throws VhostdError io */
  readU16(offset: number): number {
    const [low = 0, high = 0] = this.read(offset, 2);
    return low | (high << 8);
  }

  /** @throws VhostdError io */
  writeU16(offset: number, value: number): void {
    this.write(offset, Uint8Array.of(value & 0xff, value >> 8));
  }

  /** Lets go of the file; what is mapped stays mapped. */
  [Symbol.dispose](): void {
    this.file[Symbol.dispose]();
  }
}

/**
 * Fresh memory, zeroes, mapped for the functions of the domain until `owner` releases it there.
 * @param size bytes at least
 * @throws VhostdError iommuDomain where there is no room, or what the transport says
 */
export async function claimMemory(domain: DmaDomain, owner: string, size: number): Promise<OwnMemory> {
  using undo = new DisposableStack();
  const whole = Math.ceil(size / domain.pageSize) * domain.pageSize;
  const file = undo.use(memfd(owner, whole));
  sealSize(file.number);
  const { iova } = await domain.claimFree(owner, whole, file.number);
  undo.move();
  return new OwnMemory(file, iova);
}

/**
 * The file of memory that is mapped already is as it has to be.
 * @param size bytes at least
 * @param what it is, as it appears in the error
 * @throws VhostdError invalid
 */
export function checkMemory(file: OwnedFd, size: number, what: string): void {
  const { size: length, filesystem } = fileInfo(file.number);
  if (filesystem !== "other" && length >= size) return;
  throw new VhostdError("invalid", `the stored memory of ${what} is no memory file of ${size} bytes`);
}

function shrunk(): VhostdError {
  return new VhostdError("io", "its memory was made smaller by the device's process");
}
