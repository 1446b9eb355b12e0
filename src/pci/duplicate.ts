import { OwnedFd } from "../native/fd.ts";

/** A descriptor of our own for a file that was lent to us. @throws SystemError */
export function duplicate(fd: number): OwnedFd {
  const borrowed = new OwnedFd(fd);
  try {
    return borrowed.dup();
  } finally {
    borrowed.release();
  }
}
