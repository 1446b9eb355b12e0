import { lstat } from "node:fs/promises";
import { basename } from "node:path";
import { VhostdError } from "../../base/errors.ts";
import type { Machine } from "../machine.ts";
import { bad, type Finding, ok, warn } from "./finding.ts";
import { parseQemuOptions, type QemuOption } from "./qemu-options.ts";

/** The existing stack asks for it; older ones work, with bugs of their own. */
const QEMU_WANTED = [8, 1] as const;
const GROUP_OR_OTHERS_WRITE = 0o022;

/** @throws VhostdError notFound */
export async function runningQemu(machine: Machine, pid: number): Promise<QemuOption[]> {
  const words = (await machine.bytes(`/proc/${pid}/cmdline`))?.toString("utf8").split("\0") ?? [];
  if (words.length < 2) {
    throw new VhostdError("notFound", `there is no process ${pid} with a command line`, {
      fix: "`pgrep -a qemu` lists them",
    });
  }
  return parseQemuOptions(words.slice(1));
}

/** The version of a QEMU that runs, asked of its program where that can be trusted. */
export async function checkQemuVersion(machine: Machine, pid: number): Promise<Finding[]> {
  const check = "QEMU";
  const program = await machine.link(`/proc/${pid}/exe`);
  if (program === undefined || !/^(qemu-system-\w+|qemu-kvm|kvm)$/.test(basename(program))) {
    return [warn(check, `pid ${pid} runs ${program ?? "an unknown program"}`, "give the pid of a QEMU")];
  }
  if (!(await isOfRoot(machine, program))) {
    return [
      warn(check, `${program} is not asked for its version: it is not root's`, `${program} --version, at least 8.1`),
    ];
  }
  const said = await machine.run([machine.at(program), "--version"]).catch(() => "");
  const [version, major, minor] = /version (\d+)\.(\d+)[.\d]*/.exec(said) ?? [];
  if (version === undefined)
    return [bad(check, `${program} does not say its version`, `look why ${program} does not start`)];
  const isWanted =
    Number(major) > QEMU_WANTED[0] || (Number(major) === QEMU_WANTED[0] && Number(minor) >= QEMU_WANTED[1]);
  return [isWanted ? ok(check, version) : warn(check, `${version} is older than 8.1`, "use a newer one where you can")];
}

/**
 * The process chooses what its link says, and its owner may change what is there: only a program that root has put there
 * is started, in directories of root alone, none of them by a link.
 */
async function isOfRoot(machine: Machine, program: string): Promise<boolean> {
  const parts = program.split("/").slice(1);
  if (!program.startsWith("/") || parts.some((part) => part === "" || part === "." || part === "..")) return false;
  for (let length = 0; length <= parts.length; length++) {
    const path = machine.at(`/${parts.slice(0, length).join("/")}`);
    const there = await lstat(path).catch(() => undefined);
    if (there === undefined || there.uid !== 0 || (there.mode & GROUP_OR_OTHERS_WRITE) !== 0) return false;
    if (!(length === parts.length ? there.isFile() : there.isDirectory())) return false;
  }
  return true;
}
