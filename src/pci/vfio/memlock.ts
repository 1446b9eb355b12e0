import { readFile } from "node:fs/promises";
import { VhostdError } from "../../base/errors.ts";

/** What bounds the memory that a process may have locked. Bytes. */
export interface LockedMemory {
  /** RLIMIT_MEMLOCK; Infinity where there is none. */
  readonly limit: number;
  /** Locked already, by whichever count of the kernel is higher: type 1 adds to VmLck, iommufd to VmPin. */
  readonly locked: number;
  /** CAP_IPC_LOCK: the limit does not hold for this process. */
  readonly exempt: boolean;
}

/** Bit of CAP_IPC_LOCK (capabilities(7)). */
const CAP_IPC_LOCK = 14n;

/**
 * Reads proc(5).
 * @param limits the text of /proc/PID/limits
 * @param status the text of /proc/PID/status
 * @returns undefined where they do not say
 */
export function parseLockedMemory(limits: string, status: string): LockedMemory | undefined {
  const limit = /^Max locked memory\s+(unlimited|\d+)\s/m.exec(limits)?.[1];
  const capabilities = /^CapEff:\s*([0-9a-f]+)$/m.exec(status)?.[1];
  const counts = [...status.matchAll(/^Vm(?:Lck|Pin):\s*(\d+) kB$/gm)].map(([, kilobytes]) => Number(kilobytes) * 1024);
  if (limit === undefined || capabilities === undefined) return undefined;
  return {
    limit: limit === "unlimited" ? Number.POSITIVE_INFINITY : Number(limit),
    locked: Math.max(0, ...counts),
    exempt: ((BigInt(`0x${capabilities}`) >> CAP_IPC_LOCK) & 1n) === 1n,
  };
}

/**
 * Why the kernel had no memory for a mapping, where the limit of locked memory is the cause.
 * @param wanted bytes that were to be locked in addition
 * @returns undefined where the limit leaves room for them
 */
export function memlockError(memory: LockedMemory, wanted: number, cause: unknown): VhostdError | undefined {
  const { limit, locked, exempt } = memory;
  if (exempt || locked + wanted <= limit) return undefined;
  return new VhostdError(
    "outOfMemory",
    `the limit of locked memory (RLIMIT_MEMLOCK) is ${mebibytes(limit)}; ${mebibytes(locked)} are locked, and ${mebibytes(wanted)} of guest memory are to be locked in addition`,
    {
      fix: "set LimitMEMLOCK=infinity in the service's unit (or ulimit -l unlimited), or give the daemon CAP_IPC_LOCK",
      data: { limit, locked, wanted },
      cause,
    },
  );
}

/** As memlockError, for this process. */
export async function ownMemlockError(wanted: number, cause: unknown): Promise<VhostdError | undefined> {
  const [limits, status] = await Promise.all([
    readFile("/proc/self/limits", "utf8"),
    readFile("/proc/self/status", "utf8"),
  ]);
  const memory = parseLockedMemory(limits, status);
  return memory === undefined ? undefined : memlockError(memory, wanted, cause);
}

function mebibytes(bytes: number): string {
  return `${Math.ceil(bytes / 2 ** 20)} MiB`;
}
