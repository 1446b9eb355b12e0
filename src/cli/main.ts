import { type CommandLine, formatHelp, HelpRequest, type Option, UsageError } from "../command-line.ts";
import { DEFAULT_RUNTIME_DIRECTORY } from "../runtime-directory.ts";

/** Where the daemon is, and how long to wait for it: taken before and after the command. */
export const DAEMON_OPTIONS = {
  "runtime-dir": {
    type: "string",
    value: "DIR",
    help: `of the daemon (VFE_VHOSTD_RUNTIME_DIR, ${DEFAULT_RUNTIME_DIRECTORY})`,
  },
  timeout: { type: "string", value: "SECONDS", help: "for the whole call (125)" },
} as const satisfies Record<string, Option>;

type Command = (args: readonly string[]) => Promise<number>;

/** Imported when it is used: the program is to start quickly. */
const COMMANDS: Readonly<Record<string, { readonly help: string; readonly load: () => Promise<Command> }>> = {
  version: {
    help: "show the versions of the daemon and its keeper",
    load: async () => (await import("./legacy-commands.ts")).runVersion,
  },
  mgmtpf: {
    help: "add, remove or list PFs",
    load: async () => (await import("./legacy-commands.ts")).runMgmtpf,
  },
  vf: {
    help: "add, remove, list or describe VFs",
    load: async () => (await import("./legacy-commands.ts")).runVf,
  },
  bind: {
    help: "give functions of this machine to vfio-pci",
    load: async () => (await import("./bind.ts")).runBind,
  },
  unbind: {
    help: "give functions back to the driver that they would have by themselves",
    load: async () => (await import("./bind.ts")).runUnbind,
  },
  sriov: {
    help: "set the number of VFs of a PF that vfio-pci has",
    load: async () => (await import("./sriov.ts")).runSriov,
  },
  doctor: {
    help: "check this machine, a guest's QEMU and the daemon, and tell what to do",
    load: async () => (await import("./doctor.ts")).runDoctor,
  },
  upgrade: {
    help: "replace the daemon by the one that is installed now, unnoticed by VMs",
    load: async () => (await import("./upgrade.ts")).runUpgrade,
  },
  call: {
    help: "call any method of the control interface",
    load: async () => (await import("./raw-commands.ts")).runCall,
  },
  events: {
    help: "print what happens to PFs and VFs, until interrupted",
    load: async () => (await import("./raw-commands.ts")).runEvents,
  },
};

const COMMAND_LINE: CommandLine<typeof DAEMON_OPTIONS> = {
  name: "vfe-vhost-cli",
  summary: "Controls vfe-vhostd.",
  options: DAEMON_OPTIONS,
  commands: Object.entries(COMMANDS).map(([name, { help }]) => ({ name, help })),
  notes: "vfe-vhost-cli COMMAND --help tells more about a command.",
};

/**
 * Runs one command.
 * @returns the exit code
 * @throws UsageError, HelpRequest
 */
export async function runCli(args: readonly string[]): Promise<number> {
  const { common, rest } = splitCommonOptions(args);
  const [name, ...own] = rest;
  if (name === "-h" || name === "--help") throw new HelpRequest(formatHelp(COMMAND_LINE));
  if (name === undefined) throw new UsageError("no command given", COMMAND_LINE);
  const command = Object.hasOwn(COMMANDS, name) ? COMMANDS[name] : undefined;
  if (command === undefined) {
    throw new UsageError(`"${name}" is not one of: ${Object.keys(COMMANDS).join(", ")}`, COMMAND_LINE);
  }
  const run = await command.load();
  return await run([...common, ...own]);
}

/** Options of DAEMON_OPTIONS that stand before the command. */
function splitCommonOptions(args: readonly string[]): { common: string[]; rest: readonly string[] } {
  const common: string[] = [];
  let at = 0;
  while (at < args.length) {
    const [name = ""] = args[at]!.split("=", 1);
    if (!name.startsWith("--") || !Object.hasOwn(DAEMON_OPTIONS, name.slice(2))) break;
    const length = args[at]!.includes("=") ? 1 : 2;
    common.push(...args.slice(at, at + length));
    at += length;
  }
  return { common, rest: args.slice(at) };
}
