import { basename } from "node:path";
import { describeHolders, holdersOf } from "./holders.ts";
import type { Machine } from "./machine.ts";

const BLOCK = "/sys/class/block";
const SUBSYSTEMS = "/sys/class/nvme-subsystem";

/** What uses the disks of a function. @param directory of the function, resolved */
export async function diskUses(machine: Machine, directory: string): Promise<string[]> {
  const disks = await disksOf(machine, directory);
  if (disks.length === 0) return [];
  const tables = await readTables(machine);
  const uses = await Promise.all(disks.map((name) => usesOfDisk(machine, tables, name)));
  return uses.flat();
}

/** Names of block devices, partitions too: "vda", "vda1". */
async function disksOf(machine: Machine, directory: string): Promise<string[]> {
  const own = await machine.linksBelow(BLOCK, directory);
  // An NVMe disk with several ways to it stands below its subsystem, not below the function.
  for (const subsystem of await machine.names(SUBSYSTEMS)) {
    const path = `${SUBSYSTEMS}/${subsystem}`;
    const resolved = await machine.resolve(path);
    const controllers = await machine.linksBelow(path, directory);
    if (resolved !== undefined && controllers.length > 0) own.push(...(await machine.linksBelow(BLOCK, resolved)));
  }
  return own;
}

interface Tables {
  /** Lines of mountinfo (proc(5)). */
  readonly mounts: readonly { readonly device: string; readonly source: string; readonly point: string }[];
  /** Names of block devices that are swapped to. */
  readonly swaps: ReadonlySet<string>;
}

async function readTables(machine: Machine): Promise<Tables> {
  const lines = await machine.lines("/proc/self/mountinfo");
  const mounts = lines.map((line) => {
    const [fields = "", more = ""] = line.split(" - ");
    const [, , device = "", , point = ""] = fields.split(" ");
    return { device, source: more.split(" ")[1] ?? "", point };
  });
  const swaps = (await machine.lines("/proc/swaps")).map((line) => basename(line.split(/\s/)[0]!));
  return { mounts, swaps: new Set(swaps) };
}

async function usesOfDisk(machine: Machine, tables: Tables, name: string): Promise<string[]> {
  const named = await usesByName(machine, tables, name);
  if (named.length > 0) return named;
  const holders = await holdersOf(machine, new Set([`/dev/${name}`]));
  if (holders.length > 0) return [`${name} is open in ${describeHolders(holders)}`];
  const isClaimed = await machine.isClaimed(`/dev/${name}`);
  return isClaimed ? [`${name} is held by the kernel (mounted elsewhere, or ZFS)`] : [];
}

/** Mounted, swapped to, or part of another block device, however many of them are between. */
async function usesByName(machine: Machine, tables: Tables, name: string): Promise<string[]> {
  const device = await machine.text(`${BLOCK}/${name}/dev`);
  const points = tables.mounts.filter((mount) => mount.device === device || mount.source === `/dev/${name}`);
  const uses = points.map(({ point }) => `${name} is mounted at ${point}`);
  if (uses.length === 0 && (await isInBtrfs(machine, name))) uses.push(`${name} is part of a mounted btrfs`);
  if (tables.swaps.has(name)) uses.push(`${name} is swap`);
  for (const holder of await machine.names(`${BLOCK}/${name}/holders`)) {
    const title = (await machine.text(`${BLOCK}/${holder}/dm/name`)) ?? holder;
    const further = await usesByName(machine, tables, holder);
    const ends = further.length === 0 ? "" : `: ${further.join("; ")}`;
    uses.push(`${name} is part of ${title === holder ? holder : `${holder} (${title})`}${ends}`);
  }
  return uses;
}

/** Its mounts have a device number that no disk has, and name one disk of several. */
async function isInBtrfs(machine: Machine, name: string): Promise<boolean> {
  const systems = await machine.names("/sys/fs/btrfs");
  const found = await Promise.all(systems.map((id) => machine.exists(`/sys/fs/btrfs/${id}/devices/${name}`)));
  return found.includes(true);
}
