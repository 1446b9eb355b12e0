import { checkFd, cString } from "./arguments.ts";
import { OwnedFd } from "./fd.ts";
import { c, check } from "./load.ts";

const EAGAIN = 11;
/** One element: bun:ffi has no address of an empty array. */
const NO_FDS = new Int32Array(1);

/**
 * A non-blocking datagram socket whose messages go to a unix socket.
 * @param address a path, or "@" and a name in the abstract namespace
 * @throws SystemError ENOENT and ECONNREFUSED where nobody has it
 */
export function connectDatagram(address: string): OwnedFd {
  return new OwnedFd(check(c.vhostd_connect_datagram(cString(address, "socket address")), `connect to ${address}`));
}

/**
 * Sends one message, whole or not at all.
 * @param fds borrowed, at most 253
 * @returns false where the receiver has no room for it now; `watch(fd, "out", ...)` tells when
 * @throws SystemError
 */
export function sendDatagram(fd: number, message: Uint8Array, fds: readonly number[]): boolean {
  const numbers = fds.length === 0 ? NO_FDS : Int32Array.from(fds, checkFd);
  const result = Number(c.vhostd_send(checkFd(fd), message, message.length, numbers, fds.length));
  if (result === -EAGAIN) return false;
  check(result, "send a datagram");
  return true;
}
