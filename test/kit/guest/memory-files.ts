import { type FileHandle, open, readdir, readlink } from "node:fs/promises";
import { join } from "node:path";

const PAGE = 4096;
const CHUNK = 1 << 20;

/** The guest's RAM of a running QEMU (memory-backend-memfd), as a file. @throws Error where it has none */
async function openRam(pid: number): Promise<FileHandle> {
  const folder = `/proc/${pid}/fd`;
  for (const fd of await readdir(folder)) {
    const target = await readlink(join(folder, fd)).catch(() => "");
    if (target.startsWith("/memfd:memory-backend-memfd")) return await open(join(folder, fd), "r");
  }
  throw new Error(`process ${pid} has no memory of a guest`);
}

/** A page of RAM that is not the same in two machines. */
export interface PageDifference {
  /** Guest-physical. */
  readonly address: number;
  /** Of the first byte that differs, in the page. */
  readonly offset: number;
  readonly bytes: number;
}

/** Compares RAM of two QEMUs, which must stand still. @returns pages that differ, and how many have something in them */
export async function compareRam(
  pid: number,
  other: number,
): Promise<{ readonly differences: readonly PageDifference[]; readonly used: number; readonly pages: number }> {
  await using a = await openRam(pid);
  await using b = await openRam(other);
  const { size } = await a.stat();
  const [left, right] = [Buffer.alloc(CHUNK), Buffer.alloc(CHUNK)];
  const differences: PageDifference[] = [];
  const empty = Buffer.alloc(PAGE);
  let used = 0;
  for (let place = 0; place < size; place += CHUNK) {
    await Promise.all([a.read(left, 0, CHUNK, place), b.read(right, 0, CHUNK, place)]);
    for (let page = 0; page < CHUNK; page += PAGE) {
      const [one, two] = [left.subarray(page, page + PAGE), right.subarray(page, page + PAGE)];
      if (!one.equals(empty)) used++;
      if (one.equals(two)) continue;
      const different = [...one.keys()].filter((index) => one[index] !== two[index]);
      differences.push({ address: place + page, offset: different[0]!, bytes: different.length });
    }
  }
  return { differences, used, pages: size / PAGE };
}
