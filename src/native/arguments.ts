import { VhostdError } from "../base/errors.ts";

/**
 * Checks of arguments on their way to native code. The boundary itself checks nothing: it makes 2^64 - 1 of -1, 1 of
 * 1.5 and 0 of undefined.
 */

/** @throws VhostdError invalid unless `value` is a whole number from `low` to `high` */
export function checkInteger(value: number, low: number, high: number, what: string): number {
  if (!Number.isSafeInteger(value) || value < low || value > high) {
    throw new VhostdError("invalid", `${what} is ${value}, must be a whole number from ${low} to ${high}`);
  }
  return value;
}

/** The number of an fd. @throws VhostdError invalid */
export function checkFd(fd: number): number {
  return checkInteger(fd, 0, 0x7fff_ffff, "file descriptor");
}

/** A size or an offset in a file, bytes. @throws VhostdError invalid */
export function checkSize(size: number, what: string): number {
  return checkInteger(size, 0, Number.MAX_SAFE_INTEGER, what);
}

const encoder = new TextEncoder();

/** A string for C. @throws VhostdError invalid where it is empty or contains a zero character */
export function cString(text: string, what: string): Uint8Array {
  if (text === "" || text.includes("\0")) {
    throw new VhostdError("invalid", `${what} is ${JSON.stringify(text)}, must be a text without zero characters`);
  }
  return encoder.encode(`${text}\0`);
}
