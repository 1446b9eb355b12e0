import { readFile } from "node:fs/promises";
import { VhostdError } from "../../base/errors.ts";
import { fileInfo } from "../../native/sys.ts";

/** Left to everybody else. Bytes. */
const MARGIN = 256 << 20;

/** Bytes that maps which are under way may still bring into memory. */
let promised = 0;

/**
 * Whether there is memory for what pinning part of a file brings into it. The kernel brings it in on behalf of this process,
 * beyond any limit that holds for the VMM: a file of holes could take all memory of the machine.
 * @param size bytes of the file that will be pinned
 * @returns to be disposed of when they are
 * @throws VhostdError outOfMemory
 */
export async function claimRoom(fd: number, size: number, meminfo = "/proc/meminfo"): Promise<Disposable> {
  const file = fileInfo(fd);
  // Huge pages are set aside, or refused, when the file is mapped.
  const missing = file.filesystem === "hugetlbfs" ? 0 : Math.min(size, Math.max(0, file.size - file.allocated));
  const text = missing === 0 ? "" : await readFile(meminfo, "utf8");
  const available = Number(/^MemAvailable:\s*(\d+) kB$/m.exec(text)?.[1] ?? Number.POSITIVE_INFINITY) * 1024;
  if (missing > 0 && missing + promised + MARGIN > available) {
    throw new VhostdError(
      "outOfMemory",
      `guest memory of ${size} bytes is not in memory yet (${missing} bytes of it), and the machine has ${available} bytes left`,
      { fix: "give the guest less memory, or free some of the machine's", data: { missing, available } },
    );
  }
  promised += missing;
  return {
    [Symbol.dispose]: () => {
      promised -= missing;
    },
  };
}
