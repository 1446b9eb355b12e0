import { readdirSync, readFileSync, readlinkSync } from "node:fs";
import { c } from "../../../src/native/load.ts";

const CLOSE_TIMEOUT = 5000;
/** Milliseconds that a runtime may take to close what was let go of. */
const GRACE = 200;

/** What this process has open, in words that tell one file from another; one that is open twice is there twice. */
export function openDescriptors(): string[] {
  c.vhostd_wait_for_closes(CLOSE_TIMEOUT);
  const all = readdirSync("/proc/self/fd").map((name) => describeDescriptor(Number(name)));
  return all.filter((description) => description !== undefined);
}

/** "pipe:[123]", "/memfd:x 1:45", "anon_inode:[eventfd] 7"; undefined where it is not open. */
export function describeDescriptor(fd: number): string | undefined {
  try {
    const link = readlinkSync(`/proc/self/fd/${fd}`);
    const info = readFileSync(`/proc/self/fdinfo/${fd}`, "utf8");
    // Anonymous files share one inode.
    const id = /^eventfd-id:\s*(\d+)/m.exec(info)?.[1] ?? /^ino:\s*(\d+)/m.exec(info)?.[1] ?? "";
    return `${link} ${id}`;
  } catch {
    return undefined;
  }
}

/** What is open in the end and was not before; what goes within a moment does not count. */
export async function leftOpen(before: readonly string[]): Promise<string[]> {
  const end = performance.now() + GRACE;
  for (;;) {
    const left = openDescriptors();
    for (const description of before) {
      const at = left.indexOf(description);
      if (at >= 0) left.splice(at, 1);
    }
    if (left.length === 0 || performance.now() > end) return left;
    Bun.gc(true);
    await Bun.sleep(5);
  }
}
