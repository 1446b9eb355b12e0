import { checkFd, checkInteger } from "./arguments.ts";
import type { OwnedFd } from "./fd.ts";
import { addon, check } from "./load.ts";
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
 * request implies, also where the request does not tell it: the kernel writes that much.
 * @throws SystemError
 */
export async function slowIoctl(fd: number, request: number, argument: Uint8Array): Promise<number> {
  use();
  checkInteger(request, 0, 0xffff_ffff, "ioctl request");
  const number = `0x${request.toString(16)}`;
  // Most requests carry a direction and the size of their argument (linux/ioctl.h).
  const size = request >>> 30 === 0 ? 0 : (request >>> 16) & 0x3fff;
  checkInteger(argument.length, Math.max(1, size), Number.MAX_SAFE_INTEGER, `argument size of ioctl ${number}`);
  return check(await addon.slowIoctl(checkFd(fd), request, argument), `ioctl ${number}`);
}
