import { readdirSync, readFileSync, readlinkSync } from "node:fs";
import type { Deadline } from "../../../src/base/deadline.ts";

/** What a process has open, by kind, and how many mappings of memory files. */
export interface Holdings {
  readonly files: Readonly<Record<string, number>>;
  readonly guestMemory: number;
}

/** Milliseconds between two looks that must be the same. */
const REST = 100;

/** When it does not change any more. */
export async function holdings(pid: number, deadline: Deadline): Promise<Holdings> {
  let before = look(pid);
  return await deadline.poll(async () => {
    await Bun.sleep(REST);
    const now = look(pid);
    const steady = Bun.deepEquals(before, now);
    before = now;
    return steady ? now : undefined;
  }, 1);
}

/** Resident memory, bytes. */
export function residentSize(pid: number): number {
  const [, kibibytes] = /^VmRSS:\s+(\d+) kB/m.exec(readFileSync(`/proc/${pid}/status`, "utf8")) ?? [];
  return Number(kibibytes) * 1024;
}

function look(pid: number): Holdings {
  const maps = readFileSync(`/proc/${pid}/maps`, "utf8").split("\n");
  const files: Record<string, number> = {};
  for (const fd of readdirSync(`/proc/${pid}/fd`)) {
    const kind = fileKind(`/proc/${pid}/fd/${fd}`);
    // One a process, opened with the first full eventfd of a peer and kept.
    if (kind.includes("/memfd:eventfd-signal")) continue;
    files[kind] = (files[kind] ?? 0) + 1;
  }
  return { files, guestMemory: maps.filter((line) => line.includes("/memfd:")).length };
}

function fileKind(link: string): string {
  try {
    return readlinkSync(link).replace(/\d+/g, "");
  } catch {
    return "gone meanwhile";
  }
}
