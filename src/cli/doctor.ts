import { resolve } from "node:path";
import { VhostdError } from "../base/errors.ts";
import { type CommandLine, type Option, parseCommandLine, UsageError } from "../command-line.ts";
import { parseAddresses } from "../machine/bind.ts";
import type { Finding, Level } from "../machine/doctor/finding.ts";
import { examine } from "../machine/doctor/index.ts";
import { Machine } from "../machine/machine.ts";
import { daemonPlace, EXIT_FAILURE, failureOf, printFailure, printJson } from "./daemon-call.ts";
import { checkDaemon } from "./doctor-daemon.ts";
import { printLine } from "./machine-output.ts";
import { DAEMON_OPTIONS } from "./main.ts";

const OPTIONS = {
  socket: { type: "string", multiple: true, value: "PATH", help: "a vhost-user socket to look at" },
  qemu: { type: "string", value: "PID", help: "a QEMU that runs: its options, its sockets" },
  "qemu-args": {
    type: "string",
    value: "FILE",
    help: "options of a QEMU that does not run: its command line, or the XML of a libvirt domain",
  },
  json: { type: "boolean", help: "one object with all findings" },
  ...DAEMON_OPTIONS,
} as const satisfies Record<string, Option>;

const LINE: CommandLine<typeof OPTIONS> = {
  name: "vfe-vhost-cli doctor",
  summary: "Checks this machine, a guest's QEMU and the daemon. Exit code 1 where something is bad.",
  options: OPTIONS,
  positionals: [{ name: "DEVICE", help: "functions that are to be used (all virtio functions)", multiple: true }],
};

const LARGEST_PID = 2 ** 22;
/** As wide as the longest. */
const MARKS: Readonly<Record<Level, string>> = { ok: "ok  ", warn: "warn", bad: "BAD " };

export async function runDoctor(args: readonly string[]): Promise<number> {
  const { values, positionals } = parseCommandLine(LINE, args);
  const place = daemonPlace(values, LINE);
  const machine = new Machine();
  try {
    const subjects = {
      devices: parseAddresses(positionals),
      sockets: (values.socket ?? []).map((path) => resolve(path)),
      rpcSocket: resolve(place.socket),
      qemu: pidOf(values.qemu),
      qemuArgs: values["qemu-args"],
    };
    const findings = (await Promise.all([examine(machine, subjects), checkDaemon(machine, place)])).flat();
    if (values.json === true) printJson({ ...countsOf(findings), findings });
    else printFindings(findings);
    return countsOf(findings).bad === 0 ? 0 : EXIT_FAILURE;
  } catch (error) {
    if (!(error instanceof VhostdError)) throw error;
    printFailure(failureOf(error));
    return EXIT_FAILURE;
  }
}

function pidOf(text: string | undefined): number | undefined {
  if (text === undefined) return undefined;
  const pid = Number(text);
  if (Number.isInteger(pid) && pid > 0 && pid <= LARGEST_PID) return pid;
  throw new UsageError(`--qemu is "${text}", expected a process id`, LINE);
}

function countsOf(findings: readonly Finding[]) {
  const count = (level: Level) => findings.filter((finding) => finding.level === level).length;
  return { bad: count("bad"), warn: count("warn"), ok: count("ok") };
}

function printFindings(findings: readonly Finding[]): void {
  for (const { level, check, seen, fix } of findings) {
    printLine(`${MARKS[level]}  ${check}: ${seen}`);
    if (fix !== undefined) printLine(`      → ${fix}`);
  }
  const { bad, warn } = countsOf(findings);
  printLine(`${bad} bad, ${warn} to look at`);
}
