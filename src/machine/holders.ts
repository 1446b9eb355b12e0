import type { Machine } from "./machine.ts";

/** A process of this machine. */
export interface Holder {
  readonly pid: number;
  /** Its name, at most 15 characters (proc(5), comm). */
  readonly name: string;
}

async function holder(machine: Machine, pid: number): Promise<Holder> {
  return { pid, name: (await machine.text(`/proc/${pid}/comm`)) ?? "?" };
}

/**
 * Processes that have one of the files open, by what the links of their descriptors say: a path, or "socket:[inode]".
 * Those of other users are seen by root only.
 */
export async function holdersOf(machine: Machine, targets: ReadonlySet<string>): Promise<Holder[]> {
  if (targets.size === 0) return [];
  const pids = (await machine.names("/proc")).filter((name) => /^\d+$/.test(name)).map(Number);
  const holding = await Promise.all(pids.map((pid) => holds(machine, pid, targets)));
  return await Promise.all(pids.filter((_, index) => holding[index]).map((pid) => holder(machine, pid)));
}

async function holds(machine: Machine, pid: number, targets: ReadonlySet<string>): Promise<boolean> {
  const directory = `/proc/${pid}/fd`;
  for (const name of await machine.names(directory)) {
    const target = await machine.link(`${directory}/${name}`);
    if (target !== undefined && targets.has(target)) return true;
  }
  return false;
}

/** "vfe-vhostd (pid 12), qemu-system-x86 (pid 34)". */
export function describeHolders(holders: readonly Holder[]): string {
  return holders.map(({ name, pid }) => `${name} (pid ${pid})`).join(", ");
}
