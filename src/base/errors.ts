/**
 * Errors of the daemon. Each carries a stable number (what operators and scripts know), the cause, and what to do.
 *
 * Numbers below 160 are the system's errno; numbers from 1000 are this interface's own. On the wire they are negated.
 */

/** Every failure that has a number of its own, by name. */
export const ERROR_NUMBERS = {
  notPermitted: 1,
  notFound: 2,
  io: 5,
  again: 11,
  outOfMemory: 12,
  accessDenied: 13,
  badAddress: 14,
  busy: 16,
  exists: 17,
  noDevice: 19,
  invalid: 22,
  notSupported: 95,
  protocol: 71,
  timedOut: 110,
  connectionLost: 104,
  cancelled: 125,
  noPfName: 1000,
  pfNotFound: 1001,
  noVfName: 1002,
  vfNotFound: 1003,
  vfioDeviceFd: 1004,
  limitExceeded: 1005,
  resetTimedOut: 1006,
  badArguments: 1007,
  pfExists: 1008,
  probeFailed: 1009,
  pfDeviceId: 1010,
  pfFeatures: 1011,
  adminQueue: 1012,
  pfHasVfs: 1013,
  vfExists: 1014,
  vfIndex: 1015,
  iommuContainer: 1016,
  iommuGroupBind: 1017,
  iommuGroup: 1018,
  deviceAllocation: 1019,
  deviceRegistration: 1020,
  queueAllocation: 1021,
  noVectors: 1022,
  interruptAllocation: 1023,
  interruptRegistration: 1024,
  interruptEnable: 1025,
  barRead: 1026,
  quiesceFailed: 1027,
  freezeFailed: 1028,
  tooManySockets: 1029,
  socketPath: 1030,
  vhostRegistration: 1031,
  iommuDomain: 1037,
  socketInUse: 1038,
  tooManyGroups: 1039,
  stateSave: 1040,
  keeperStore: 1041,
  vfRestoring: 1042,
} as const;

export type ErrorCode = keyof typeof ERROR_NUMBERS;

export interface ErrorDetails {
  /** What the person or program that sees this can do about it, as a sentence. */
  readonly fix?: string;
  /** Values seen and limits, for programs. */
  readonly data?: Readonly<Record<string, unknown>>;
  readonly cause?: unknown;
}

/** The one error class of the daemon. `message` says what was wrong, with the value seen and the limit. */
export class VhostdError extends Error {
  readonly code: ErrorCode | "system";
  /** Positive; the control interface negates it. */
  readonly number: number;
  readonly fix: string | undefined;
  readonly data: Readonly<Record<string, unknown>> | undefined;

  constructor(code: ErrorCode | number, message: string, details: ErrorDetails = {}) {
    super(message, details.cause === undefined ? undefined : { cause: details.cause });
    this.name = "VhostdError";
    this.code = typeof code === "number" ? "system" : code;
    this.number = typeof code === "number" ? code : ERROR_NUMBERS[code];
    this.fix = details.fix;
    this.data = details.data;
  }
}

/** A system call that failed. `errno` is positive; `call` names the call and what it was about. */
export class SystemError extends VhostdError {
  constructor(
    readonly call: string,
    readonly errno: number,
    details: ErrorDetails = {},
  ) {
    super(errno, `${call}: ${errnoText(errno)}`, details);
    this.name = "SystemError";
  }
}

/** Names of the errno values that operators meet here; others are shown by number. */
const ERRNO_NAMES: Readonly<Record<number, string>> = {
  1: "EPERM, operation not permitted",
  2: "ENOENT, no such file or directory",
  4: "EINTR, interrupted",
  5: "EIO, input/output error",
  6: "ENXIO, no such device or address",
  7: "E2BIG, too long",
  9: "EBADF, bad file descriptor",
  11: "EAGAIN, not ready",
  12: "ENOMEM, out of memory",
  13: "EACCES, permission denied",
  14: "EFAULT, bad address",
  16: "EBUSY, in use",
  17: "EEXIST, exists already",
  19: "ENODEV, no such device",
  20: "ENOTDIR, not a directory",
  22: "EINVAL, invalid argument",
  24: "EMFILE, too many open files in this process",
  28: "ENOSPC, no space left",
  32: "EPIPE, the other end is closed",
  36: "ENAMETOOLONG, name too long",
  71: "EPROTO, protocol error",
  88: "ENOTSOCK, no socket",
  95: "EOPNOTSUPP, not supported",
  98: "EADDRINUSE, address in use",
  104: "ECONNRESET, connection reset",
  107: "ENOTCONN, not connected",
  110: "ETIMEDOUT, timed out",
  111: "ECONNREFUSED, nobody listens",
};

/** Human text of a positive errno. */
export function errnoText(errno: number): string {
  return ERRNO_NAMES[errno] ?? `errno ${errno}`;
}

/** Any thrown value as an Error, so that handlers need one shape. */
export function asError(value: unknown): Error {
  return value instanceof Error ? value : new Error(String(value));
}

/** What was wrong and what to do about it, in one line. */
export function sentence(error: Error): string {
  const fix = error instanceof VhostdError && error.fix !== undefined ? `; ${error.fix}` : "";
  return `${error.message}${fix}`;
}

/** The number of any error: its own, or EIO for one that has none. */
export function errorNumber(error: unknown): number {
  return error instanceof VhostdError ? error.number : ERROR_NUMBERS.io;
}
