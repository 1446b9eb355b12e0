import type { Machine } from "../machine.ts";
import { bad, type Finding, ok, warn } from "./finding.ts";

/** Capability bits (linux/capability.h). */
const CAP_IPC_LOCK = 14n;
/** A VF takes a few descriptors for each of its queues, and one for each region of memory. */
const OPEN_FILES_WANTED = 16_384;
const FILES_FIX = "LimitNOFILE=1048576 in its unit, or ulimit -n 1048576 before it is started";

/**
 * What a process may lock and open.
 * @param pid the daemon, or undefined where it does not run: then this process, as an example
 */
export async function checkLimits(machine: Machine, pid: number | undefined): Promise<Finding[]> {
  const process = `/proc/${pid ?? "self"}`;
  const whose = pid === undefined ? "of this shell" : `of the daemon (pid ${pid})`;
  const [limits, status] = await Promise.all([machine.text(`${process}/limits`), machine.text(`${process}/status`)]);
  if (limits === undefined) return [];
  return [checkMemory(limits, status ?? "", whose), checkFiles(limits, whose)];
}

function checkMemory(limits: string, status: string, whose: string): Finding {
  const check = "locked memory";
  const soft = /^Max locked memory\s+(\S+)/m.exec(limits)?.[1] ?? "0";
  if (soft === "unlimited") return ok(check, `unlimited ${whose}`);
  const capabilities = BigInt(`0x${/^CapEff:\s*([0-9a-f]+)$/m.exec(status)?.[1] ?? "0"}`);
  const seen = `${soft} bytes ${whose}`;
  if ((capabilities >> CAP_IPC_LOCK) & 1n) return ok(check, `${seen}, which CAP_IPC_LOCK lifts`);
  return bad(
    check,
    `${seen}: guest memory would exceed it`,
    "LimitMEMLOCK=infinity in its unit, or ulimit -l unlimited before it is started",
  );
}

function checkFiles(limits: string, whose: string): Finding {
  const hard = /^Max open files\s+\S+\s+(\S+)/m.exec(limits)?.[1] ?? "0";
  const seen = `${hard} ${whose}`;
  return hard === "unlimited" || Number(hard) >= OPEN_FILES_WANTED
    ? ok("open files", seen)
    : warn("open files", `${seen}: not enough for many VFs`, FILES_FIX);
}
