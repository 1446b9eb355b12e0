import { SystemError, VhostdError } from "../base/errors.ts";
import { struct } from "../base/layout.ts";
import { checkFd, checkInteger, checkSize } from "./arguments.ts";
import type { OwnedFd } from "./fd.ts";
import { addon, c, check } from "./load.ts";
import { onStop } from "./stop.ts";

/**
 * System calls that can take seconds, each on a thread of its own: one that hangs delays no other call, and none of
 * the engine's file system calls. The event loop is kept alive until they have ended.
 */

let used = false;

function use(): void {
  if (used) return;
  used = true;
  onStop(() => {
    addon.slowWait();
    used = false;
  });
}

/** Takes over the fd and closes it: the last close of a big memory file gives all its pages back. @throws SystemError */
export async function slowClose(fd: OwnedFd): Promise<void> {
  use();
  check(await addon.slowClose(fd.release()), "close");
}

/**
 * An ioctl.
 * @param fd borrowed for the call: the thread has a duplicate
 * @param argument what the kernel reads; what it wrote is there when the promise resolves. Must have the size that the
 * request implies, also where the request does not tell it: the kernel writes that much. A number is the argument itself.
 * @throws SystemError
 */
export async function slowIoctl(fd: number, request: number, argument: Uint8Array | number): Promise<number> {
  use();
  const number = checkIoctl(request, argument);
  return check(await addon.slowIoctl(checkFd(fd), request, argument), `ioctl ${number}`);
}

/** As slowIoctl, at once: for questions that the kernel answers without waiting for anything. @throws SystemError */
export function quickIoctl(fd: number, request: number, argument: Uint8Array): number {
  const number = checkIoctl(request, argument);
  return check(c.vhostd_ioctl(checkFd(fd), request, argument), `ioctl ${number}`);
}

/** @returns the request for messages. @throws VhostdError invalid */
function checkIoctl(request: number, argument: Uint8Array | number): string {
  checkInteger(request, 0, 0xffff_ffff, "ioctl request");
  const number = `0x${request.toString(16)}`;
  // Most requests carry a direction and the size of their argument (linux/ioctl.h).
  const size = request >>> 30 === 0 ? 0 : (request >>> 16) & 0x3fff;
  if (typeof argument !== "number") {
    checkInteger(argument.length, Math.max(1, size), Number.MAX_SAFE_INTEGER, `argument size of ioctl ${number}`);
  } else if (size > 0) {
    // The kernel would take the number for an address.
    throw new VhostdError("invalid", `ioctl ${number} reads ${size} bytes; its argument is the number ${argument}`);
  } else {
    checkSize(argument, `argument of ioctl ${number}`);
  }
  return number;
}

/** One access to a file, as a driver means it. */
export interface FileAccess {
  /** Bytes from the begin of the file. */
  readonly offset: number;
  readonly width: 1 | 2 | 4;
  /** Written, little-endian; left out where it is read. */
  readonly value?: number;
}

/** FileAccess of native/slow.h. */
const FILE_ACCESS = struct("FileAccess", 24, {
  offset: [0, "addr"],
  width: [8, "u32"],
  write: [12, "u32"],
  value: [16, "u32"],
  result: [20, "u32"],
});

/**
 * Reads and writes at offsets, one after the other, each by one system call of its width. One that fails does not keep those
 * after it from being made.
 * @param fd borrowed for the call: the thread has a duplicate
 * @returns of each the value, or why it failed
 * @throws SystemError where none could be made
 */
export async function slowAccess(fd: number, accesses: readonly FileAccess[]): Promise<(number | VhostdError)[]> {
  use();
  const table = new Uint8Array(accesses.length * FILE_ACCESS.size);
  for (const [index, { offset, width, value }] of accesses.entries()) {
    checkSize(offset, "offset of an access");
    if (value !== undefined) checkInteger(value, 0, 2 ** (8 * width) - 1, "value");
    const write = value === undefined ? 0 : 1;
    FILE_ACCESS.write(table, { offset, width, write, value: value ?? 0 }, index * FILE_ACCESS.size);
  }
  check(await addon.slowAccess(checkFd(fd), table), "access to a file");
  return accesses.map(({ width }, index) => {
    const { write, value, result } = FILE_ACCESS.read(table, index * FILE_ACCESS.size);
    const count = result | 0;
    if (count === width) return value;
    if (count < 0) return new SystemError(write === 0 ? "pread" : "pwrite", -count);
    return new VhostdError("io", `${count} of ${width} bytes were carried over`);
  });
}
