import { resolve } from "node:path";
import { parseArgs } from "node:util";

import { sentence, VhostdError } from "../base/errors.ts";
import { createLogger, LOG_LEVELS, type LogLevel, silentLogger } from "../base/log.ts";
import { type CommandLine, type Option, parseCommandLine, UsageError } from "../command-line.ts";
import { parsePciAddress } from "../pci/address.ts";
import type { SoftOption } from "../plugin.ts";
import { BUILT_IN_PLUGINS, PluginRegistry } from "../plugin-host.ts";
import { dieOfUnhandled, exitSoon, stopSignal } from "../process.ts";
import { takeServiceEnvironment } from "../systemd/service-environment.ts";
import { VERSION } from "../version.ts";
import { allOptions, optionFlag } from "./class-options.ts";
import {
  DEFAULT_SOFTVF_DIRECTORY,
  DEFAULT_VFS,
  findClass,
  parseVfCount,
  readConfigFile,
  type SoftvfConfig,
} from "./config.ts";
import { runControl } from "./control-commands.ts";
import { PF_OPTIONS } from "./pf-options.ts";

const NAME = "vfe-softvf";

const OPTIONS = {
  config: { type: "string", value: "FILE", help: "several PFs, TOML; instead of --pf" },
  pf: { type: "string", value: "ADDRESS", help: "PCI address of the PF; its VFs have the addresses behind it" },
  class: { type: "string", value: "NAME", help: "device class of the VFs; with --help: its options" },
  vfs: { type: "string", value: "N", help: `number of VFs (${DEFAULT_VFS})` },
  plugin: { type: "string", multiple: true, value: "PATH", help: "one more plugin; may be repeated" },
  "runtime-dir": { type: "string", value: "DIR", help: `devices and sockets (${DEFAULT_SOFTVF_DIRECTORY})` },
  "log-level": { type: "string", value: "LEVEL", help: `${Object.keys(LOG_LEVELS).join(", ")} (info)` },
  version: { type: "boolean", help: "print the version and exit" },
} as const satisfies Record<string, Option>;

const COMMAND_LINE: CommandLine<typeof OPTIONS> = {
  name: NAME,
  summary: "Serves a software PF and its VFs over vfio-user, in a directory laid out like /sys/bus/pci/devices.",
  options: OPTIONS,
  notes: [
    'Prints "ready DIR" when all functions are served. SIGTERM and SIGINT stop it.',
    `While it runs: ${NAME} list, ${NAME} stats, ${NAME} set ADDRESS OPTION=VALUE... (each with --runtime-dir).`,
  ].join("\n"),
};

/** @returns the exit code. @throws UsageError, HelpRequest */
export async function runSoftvf(args: readonly string[]): Promise<number> {
  try {
    const command = args[0];
    if (command === "list" || command === "stats" || command === "set") return await runControl(command, args.slice(1));
    return await serve(args);
  } catch (error) {
    if (!(error instanceof VhostdError) && !isFileError(error)) throw error;
    process.stderr.write(`${NAME}: ${sentence(error)}\n`);
    return 1;
  }
}

async function serve(args: readonly string[]): Promise<number> {
  const config = await readCommandLine(args);
  if (config === "version") {
    process.stdout.write(`${VERSION}\n`);
    return 0;
  }
  const log = createLogger(config.logLevel);
  dieOfUnhandled(log);
  const asked = stopSignal();
  // Not before: --help and mistakes on the command line are answered where native/ is not built, too.
  const [{ Softvf }, { stopNative }, { Notify }] = await Promise.all([
    import("./softvf.ts"),
    import("../native/stop.ts"),
    import("../systemd/notify.ts"),
  ]);
  using notify = new Notify(takeServiceEnvironment(), log);
  const softvf = new Softvf(config, log);
  try {
    await softvf.start();
    process.stdout.write(`ready ${config.runtimeDirectory}\n`);
    notify.ready();
    log.info(`${await asked}: stopping`);
    notify.stopping();
    return 0;
  } finally {
    await softvf.stop();
    stopNative();
    exitSoon();
  }
}

async function readCommandLine(args: readonly string[]): Promise<SoftvfConfig | "version"> {
  const pfOptions = await optionsOfPf(args);
  const commandLine = { ...COMMAND_LINE, options: { ...OPTIONS, ...pfOptions } };
  const { values } = parseCommandLine(commandLine, args);
  if (values.version === true) return "version";
  const level = values["log-level"];
  if (level !== undefined && !Object.hasOwn(LOG_LEVELS, level)) {
    throw new UsageError(`"${level}" is not a log level: ${Object.keys(LOG_LEVELS).join(", ")}`, commandLine);
  }
  const plugins = (values.plugin ?? []).map(pluginPath);
  const directory = values["runtime-dir"];
  const overrides = {
    ...(level === undefined ? {} : { logLevel: level as LogLevel }),
    ...(directory === undefined ? {} : { runtimeDirectory: resolve(directory) }),
  };
  if (values.config !== undefined) {
    if (values.pf !== undefined) throw new UsageError("--config and --pf exclude each other", commandLine);
    const file = await readConfigFile(values.config);
    return { ...file, ...overrides, plugins: [...file.plugins, ...plugins] };
  }
  const { pf, class: className } = values;
  if (pf === undefined || className === undefined) {
    throw new UsageError("name a PF and its class (--pf, --class), or a configuration (--config)", commandLine);
  }
  const given = Object.entries(values).filter(([flag]) => Object.hasOwn(pfOptions, flag));
  const request = {
    address: parsePciAddress(pf),
    className,
    vfs: values.vfs === undefined ? DEFAULT_VFS : parseVfCount(values.vfs),
    options: Object.fromEntries(given),
    directory: process.cwd(),
  };
  return {
    runtimeDirectory: DEFAULT_SOFTVF_DIRECTORY,
    logLevel: "info",
    pluginDirectory: undefined,
    pfs: [request],
    plugins,
    ...overrides,
  };
}

/** Those of the PF, and of its class, which has to be known before the rest of the command line can be read. */
async function optionsOfPf(args: readonly string[]): Promise<Record<string, Option>> {
  const { values } = parseArgs({
    args: [...args],
    options: { class: { type: "string" }, plugin: { type: "string", multiple: true } },
    strict: false,
  });
  const { class: className, plugin } = values;
  if (typeof className !== "string") return commandLineOptions(PF_OPTIONS);
  const plugins = Array.isArray(plugin) ? plugin.filter((path) => typeof path === "string").map(pluginPath) : [];
  const registry = await PluginRegistry.load({ builtIn: BUILT_IN_PLUGINS, plugins }, silentLogger);
  const { softDevice } = findClass(className, registry);
  return { ...commandLineOptions(allOptions(softDevice)), ...commandLineOptions(PF_OPTIONS) };
}

function commandLineOptions(options: Readonly<Record<string, SoftOption>>): Record<string, Option> {
  return Object.fromEntries(
    Object.entries(options).map(([name, option]) => [optionFlag(name), commandLineOption(option)]),
  );
}

function commandLineOption({ type, description, default: preset }: SoftOption): Option {
  // A switch that is on needs a value to be put off.
  if (type === "boolean" && preset !== true) return { type: "boolean", help: description };
  const shown = preset === undefined || preset === "" ? "" : ` (${preset === true ? "on" : preset})`;
  const value = { string: "TEXT", path: "FILE", number: "N", size: "SIZE", boolean: "on|off" }[type];
  return { type: "string", value, help: `${description}${shown}` };
}

function pluginPath(path: string): string {
  return /^[./]/.test(path) ? resolve(path) : path;
}

/** A directory that cannot be made, and the like: the text names the call and the path. */
function isFileError(error: unknown): error is NodeJS.ErrnoException {
  return error instanceof Error && "syscall" in error && "path" in error;
}
