import { constants, open } from "node:fs";
import { SystemError } from "../../base/errors.ts";
import { OwnedFd } from "../../native/fd.ts";

const O_CLOEXEC = 0o2000000;

/**
 * Opens a character device for reading and writing, on a thread: the kernel makes it wait while another process opens or
 * closes a function of the same group, which takes as long as a reset.
 * @throws SystemError
 */
export function openDeviceFile(path: string): Promise<OwnedFd> {
  return new Promise((resolve, reject) => {
    open(path, constants.O_RDWR | O_CLOEXEC, (error, fd) => {
      if (error === null) resolve(new OwnedFd(fd));
      else reject(new SystemError(`open ${path}`, Math.abs(error.errno ?? 0), { cause: error }));
    });
  });
}
