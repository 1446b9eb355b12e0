import { resolve } from "node:path";
import type { Static } from "typebox";
import { Deadline } from "../base/deadline.ts";
import { asError, ERROR_NUMBERS, VhostdError } from "../base/errors.ts";
import { type CommandLine, type Option, parseCommandLine, UsageError } from "../command-line.ts";
import { RpcClient } from "../rpc/client.ts";
import { controlSocket, DEFAULT_SOFTVF_DIRECTORY } from "./config.ts";
import type { FunctionInfo, FunctionStats } from "./control.ts";

export type ControlCommand = "list" | "stats" | "set";

const SUMMARIES: Readonly<Record<ControlCommand, string>> = {
  list: "Lists the functions that a running vfe-softvf serves.",
  stats: "Shows what each queue of each VF has done.",
  set: "Changes options of a VF or PF while it runs, for example size=2G, slow=50 or freeze=list.",
};
const ECONNREFUSED = 111;
/** Seconds. */
const DEFAULT_TIMEOUT = 10;
const LONGEST_TIMEOUT = 86_400;

const OPTIONS = {
  "runtime-dir": { type: "string", value: "DIR", help: `of the running vfe-softvf (${DEFAULT_SOFTVF_DIRECTORY})` },
  timeout: { type: "string", value: "SECONDS", help: `longest wait for the answer (${DEFAULT_TIMEOUT})` },
} as const satisfies Record<string, Option>;
const SETTING = /^[a-zA-Z][a-zA-Z-]*=/;

/** Asks a running vfe-softvf. @returns the exit code. @throws UsageError, HelpRequest, VhostdError */
export async function runControl(command: ControlCommand, args: readonly string[]): Promise<number> {
  // Any number of them, which a command line's table of arguments does not know.
  const settings = command === "set" ? args.filter((argument) => SETTING.test(argument)) : [];
  const commandLine: CommandLine<typeof OPTIONS> = {
    name: `vfe-softvf ${command}`,
    summary: SUMMARIES[command],
    options: OPTIONS,
    positionals:
      command === "set"
        ? [
            { name: "ADDRESS", help: "PCI address of the VF or PF" },
            { name: "OPTION=VALUE...", help: "live options; see docs/softvf.md" },
          ]
        : [],
  };
  const { values, positionals } = parseCommandLine(
    commandLine,
    args.filter((argument) => !settings.includes(argument)),
  );
  const params = command === "set" ? parseSettings(positionals, settings, commandLine) : {};
  const seconds = Number(values.timeout ?? DEFAULT_TIMEOUT);
  if (!(seconds > 0 && seconds <= LONGEST_TIMEOUT)) {
    throw new UsageError(`--timeout is "${values.timeout}", expected seconds, more than 0`, commandLine);
  }
  const path = controlSocket(resolve(values["runtime-dir"] ?? DEFAULT_SOFTVF_DIRECTORY));
  const deadline = Deadline.after(seconds * 1000, `${command} at ${path}`);
  using client = await connect(path, deadline);
  const answer = await client.call(command, params, deadline);
  if (command === "list") print((answer as Static<typeof FunctionInfo>[]).map(listRow));
  if (command === "stats") print((answer as Static<typeof FunctionStats>[]).flatMap(statRows));
  return 0;
}

/** The client of the control interface speaks of the daemon, which this is not. */
async function connect(path: string, deadline: Deadline): Promise<RpcClient> {
  try {
    return await RpcClient.connect(path, deadline);
  } catch (cause) {
    const number = cause instanceof VhostdError ? cause.number : 0;
    if (number !== ERROR_NUMBERS.notFound && number !== ECONNREFUSED) throw cause;
    const fix = "start vfe-softvf, or name the directory of a running one with --runtime-dir";
    throw new VhostdError(number, asError(cause).message, { fix, cause });
  }
}

function parseSettings(
  [address, stray]: readonly string[],
  settings: readonly string[],
  commandLine: CommandLine<typeof OPTIONS>,
) {
  if (stray !== undefined) throw new UsageError(`"${stray}" is not OPTION=VALUE`, commandLine);
  if (address === undefined || settings.length === 0) {
    throw new UsageError("name a function and at least one OPTION=VALUE", commandLine);
  }
  const options = settings.map((text) => {
    const at = text.indexOf("=");
    return [text.slice(0, at), text.slice(at + 1)] as const;
  });
  return { address, options: Object.fromEntries(options) };
}

function listRow(info: Static<typeof FunctionInfo>): string[] {
  const kind = info.pf === undefined ? "pf" : "vf";
  const status = `status 0x${info.status.toString(16).padStart(2, "0")}`;
  const client = info.client ? "in use" : "free";
  const link = info.link === undefined ? "-" : `link ${info.link ? "up" : "down"}`;
  const queues = `queues ${info.queues.join(",")}`;
  const { admin } = info;
  const commands = admin === undefined ? "" : `${admin.commands} admin commands in ${admin.microseconds} us`;
  return [info.address, kind, info.class, client, status, info.internal ?? "-", link, queues, commands];
}

function statRows({ address, queues }: Static<typeof FunctionStats>): string[][] {
  return queues.map(({ received, completed, bad, bytes }, queue) => [
    address,
    `queue ${queue}`,
    `${received} received`,
    `${completed} completed`,
    `${bad} bad`,
    `${bytes} bytes`,
  ]);
}

function print(rows: readonly (readonly string[])[]): void {
  const widths = (rows[0] ?? []).map((_, column) => Math.max(...rows.map((row) => row[column]!.length)));
  const lines = rows.map((row) => row.map((cell, column) => cell.padEnd(widths[column]!)).join("  "));
  process.stdout.write(lines.map((line) => `${line.trimEnd()}\n`).join(""));
}
