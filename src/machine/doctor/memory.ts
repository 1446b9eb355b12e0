import type { Machine } from "../machine.ts";
import { type Finding, ok, warn } from "./finding.ts";

const HUGE_PAGES = "/sys/kernel/mm/hugepages";
const NODES = "/sys/devices/system/node";
const MIB = 1 << 20;

/** A pool of huge pages. */
interface Pool {
  /** Bytes of a page. */
  readonly size: number;
  readonly total: number;
  readonly free: number;
}

/**
 * Huge pages, and whether a guest's memory fits into them.
 * @param guestBytes what a guest that is not running yet wants of pages of a size in bytes
 */
export async function checkHugePages(
  machine: Machine,
  guestBytes?: { bytes: number; page: number },
): Promise<Finding[]> {
  const pools = (await readPools(machine, HUGE_PAGES)).filter(({ total }) => total > 0);
  const check = "huge pages";
  if (guestBytes !== undefined) {
    const { bytes, page } = guestBytes;
    const pool = pools.find(({ size }) => size === page);
    const free = (pool?.free ?? 0) * page;
    if (free < bytes) {
      const pages = Math.ceil((bytes - free) / page);
      const fix = `echo ${(pool?.total ?? 0) + pages} > ${HUGE_PAGES}/hugepages-${page / 1024}kB/nr_hugepages`;
      return [warn(check, `the guest wants ${mib(bytes)} of ${mib(page)} pages, ${mib(free)} are free`, fix)];
    }
  }
  if (pools.length === 0) {
    const fix =
      `echo N > ${NODES}/nodeM/hugepages/hugepages-1048576kB/nr_hugepages; guests work without (memory-backend-memfd), ` +
      "but mapping takes longer and the IOMMU more entries";
    return [warn(check, "none", fix)];
  }
  const findings = await Promise.all(pools.map((pool) => describePool(machine, pool)));
  const mounts = (await machine.lines("/proc/self/mountinfo")).filter((line) => line.includes(" - hugetlbfs "));
  if (mounts.length === 0) {
    const fix = "mount -t hugetlbfs -o pagesize=1G none /dev/hugepages1G; memory-backend-memfd,hugetlb=on needs none";
    findings.push(warn(check, "no hugetlbfs is mounted", fix));
  }
  return findings;
}

async function describePool(machine: Machine, { size, total, free }: Pool): Promise<Finding> {
  const nodes = (await machine.names(NODES)).filter((name) => /^node\d+$/.test(name));
  const shares = await Promise.all(
    nodes.map(async (node) => {
      const pool = (await readPools(machine, `${NODES}/${node}/hugepages`)).find((one) => one.size === size);
      return pool === undefined ? [] : [`${node} ${pool.free}/${pool.total}`];
    }),
  );
  const perNode = shares.flat();
  const seen = `${free} of ${total} pages of ${mib(size)} free${perNode.length > 1 ? ` (${perNode.join(", ")})` : ""}`;
  return ok("huge pages", seen);
}

async function readPools(machine: Machine, directory: string): Promise<Pool[]> {
  const pools = (await machine.names(directory)).map(async (name) => {
    const size = Number(/^hugepages-(\d+)kB$/.exec(name)?.[1] ?? 0) * 1024;
    const [total = 0, free = 0] = await Promise.all([
      machine.number(`${directory}/${name}/nr_hugepages`),
      machine.number(`${directory}/${name}/free_hugepages`),
    ]);
    return { size, total, free };
  });
  return await Promise.all(pools);
}

function mib(bytes: number): string {
  return bytes % (1024 * MIB) === 0 ? `${bytes / (1024 * MIB)} GiB` : `${bytes / MIB} MiB`;
}
