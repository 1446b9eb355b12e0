import { readdir, readFile, readlink } from "node:fs/promises";
import { join } from "node:path";

/** A process that has a file of VFIO open, or mapped. */
export interface Holder {
  readonly pid: number;
  /** Its name, as ps shows it. */
  readonly name: string;
  /** What it holds, for people. */
  readonly what: string;
  /** false: a function's file, and the kernel does not say of which function. */
  readonly certain: boolean;
}

/** What functions' files opened through a group are called in /proc, with or without what they belong to. */
const ANONYMOUS_DEVICE = /^anon_inode:\[vfio-device\]/;
/** What stands in the list of mappings of whoever has one of a function. */
const TRACES = ["/dev/vfio/", "[vfio-device"];
/** Bounds of the search: what is beyond is not looked at. */
const PROCESSES_MAX = 4096;
const FILES_MAX = 4096;
const MAPS_MAX = 4 << 20;

/**
 * Which processes have one of `paths` (/dev/vfio/12, /dev/vfio/devices/vfio3) open or mapped, or a function's file of which
 * nobody can say more. Those that this process may not look into are left out.
 * @param address of the function; newer kernels say in fdinfo to which one a file belongs
 */
export async function findHolders(paths: readonly string[], address: string, proc = "/proc"): Promise<Holder[]> {
  const pids = (await readNames(proc)).filter((name) => /^\d+$/.test(name)).slice(0, PROCESSES_MAX);
  const holders: Holder[] = [];
  for (const pid of pids) {
    const held = (await openFile(join(proc, pid), paths, address)) ?? (await mappedFile(join(proc, pid), paths));
    if (held !== undefined) holders.push({ pid: Number(pid), name: await processName(join(proc, pid)), ...held });
  }
  return holders;
}

/** In words: who is known to hold it, or else who might. */
export function describeHolders(holders: readonly Holder[], self = process.pid): string | undefined {
  const known = holders.filter(({ certain }) => certain);
  // This process has functions' files of its own.
  const named = known.length > 0 ? known : holders.filter(({ pid }) => pid !== self);
  if (named.length === 0) return undefined;
  const words = named.map(({ pid, name, what }) =>
    pid === self ? `this daemon, process ${pid} (${what}), for another VM` : `process ${pid} "${name}" (${what})`,
  );
  return `${known.length > 0 ? "held by" : "perhaps held by"} ${words.join(", ")}`;
}

type Held = Pick<Holder, "what" | "certain">;

async function openFile(directory: string, paths: readonly string[], address: string): Promise<Held | undefined> {
  let perhaps: Held | undefined;
  for (const fd of (await readNames(join(directory, "fd"))).slice(0, FILES_MAX)) {
    const target = await readlink(join(directory, "fd", fd)).catch(() => "");
    if (paths.includes(target)) return { what: `${target} is open`, certain: true };
    if (!ANONYMOUS_DEVICE.test(target)) continue;
    const owner = await functionOf(join(directory, "fdinfo", fd));
    if (owner === address) return { what: "the function is open", certain: true };
    if (owner === undefined) perhaps = { what: "a function of VFIO is open", certain: false };
  }
  return perhaps;
}

/** A front-end maps the doorbells of a queue, and needs no file of it then. */
async function mappedFile(directory: string, paths: readonly string[]): Promise<Held | undefined> {
  const bytes = await readFile(join(directory, "maps")).catch(() => undefined);
  // A process may have tens of thousands of mappings, and almost none has one of these.
  if (bytes === undefined || !TRACES.some((trace) => bytes.includes(trace))) return undefined;
  const maps = bytes.subarray(0, MAPS_MAX).toString("utf8");
  const files = maps.split("\n").map((line) => line.split(/\s+/, 6)[5] ?? "");
  const path = files.find((file) => paths.includes(file));
  if (path !== undefined) return { what: `${path} is mapped`, certain: true };
  if (files.some((file) => ANONYMOUS_DEVICE.test(file)))
    return { what: "registers of a function of VFIO are mapped", certain: false };
  return undefined;
}

/** @returns the function's address where the kernel tells it (6.17 or newer) */
async function functionOf(fdinfo: string): Promise<string | undefined> {
  const text = await readFile(fdinfo, "utf8").catch(() => "");
  return /^vfio-device-syspath:\s*\S*\/([^/\s]+)$/m.exec(text)?.[1];
}

async function processName(directory: string): Promise<string> {
  return (await readFile(join(directory, "comm"), "utf8").catch(() => "")).trim();
}

async function readNames(directory: string): Promise<string[]> {
  return await readdir(directory).catch(() => []);
}
