import { asError, sentence } from "../base/errors.ts";
import { createLogger, LOG_LEVELS } from "../base/log.ts";
import { type CommandLine, type Option, parseCommandLine } from "../command-line.ts";
import { dieOfUnhandled, exitSoon, stopSignal } from "../process.ts";
import { DEFAULT_RUNTIME_DIRECTORY } from "../runtime-directory.ts";
import { VERSION } from "../version.ts";
import {
  type DaemonConfig,
  DEFAULT_BUS_DIRECTORIES,
  DEFAULT_STATE_DIRECTORY,
  loadConfig,
  VFIO_INTERFACES,
} from "./config.ts";
import type { Deadlines } from "./deadlines.ts";

const OPTIONS = {
  config: { type: "string", value: "FILE", help: "configuration, TOML; the options below go before it" },
  "runtime-dir": { type: "string", value: "DIR", help: `sockets and state (${DEFAULT_RUNTIME_DIRECTORY})` },
  bus: {
    type: "string",
    multiple: true,
    value: "DIR",
    help: `directory of PCI functions; may be repeated (${DEFAULT_BUS_DIRECTORIES.join(", ")})`,
  },
  "rpc-tcp": { type: "string", value: "HOST:PORT", help: "serve the control interface on loopback TCP too (off)" },
  "log-level": { type: "string", value: "LEVEL", help: `${Object.keys(LOG_LEVELS).join(", ")} (info)` },
  "state-dir": { type: "string", value: "DIR", help: `what outlives a reboot (${DEFAULT_STATE_DIRECTORY})` },
  vfio: {
    type: "string",
    value: "KIND",
    help: `how functions of this machine are opened: ${VFIO_INTERFACES.join(", ")} (auto)`,
  },
  version: { type: "boolean", help: "print the version and exit" },
} as const satisfies Record<string, Option>;

const COMMAND_LINE: CommandLine<typeof OPTIONS> = {
  name: "vfe-vhostd",
  summary: "Serves vhost-user front-ends by virtio PCI virtual functions.",
  options: OPTIONS,
  notes: 'Prints "ready DIR" when the control interface is served. SIGTERM and SIGINT stop it.',
};

/**
 * The daemon as a process: runs until SIGTERM or SIGINT.
 * @param deadlines others than the usual ones
 * @returns the exit code
 * @throws UsageError, HelpRequest
 */
export async function runDaemon(args: readonly string[], deadlines: Partial<Deadlines> = {}): Promise<number> {
  const { values } = parseCommandLine(COMMAND_LINE, args);
  if (values.version === true) {
    process.stdout.write(`${VERSION}\n`);
    return 0;
  }
  let config: DaemonConfig;
  try {
    config = await loadConfig(values.config, {
      runtimeDirectory: values["runtime-dir"],
      busDirectories: values.bus,
      rpcTcp: values["rpc-tcp"],
      logLevel: values["log-level"],
      stateDirectory: values["state-dir"],
      vfio: values.vfio,
    });
  } catch (error) {
    process.stderr.write(`${COMMAND_LINE.name}: ${sentence(asError(error))}\n`);
    return 1;
  }
  const log = createLogger(config.logLevel);
  dieOfUnhandled(log);
  const asked = stopSignal();
  // Not before: --help and mistakes in the configuration are answered where native/ is not built, too.
  const [{ Daemon }, { stopNative }] = await Promise.all([import("./daemon.ts"), import("../native/stop.ts")]);
  const daemon = new Daemon(config, log, deadlines);
  try {
    await daemon.start();
    process.stdout.write(`ready ${config.runtimeDirectory}\n`);
    log.info(`version ${VERSION} serves ${config.runtimeDirectory}`);
    log.info(`${await asked}: stopping`);
    return 0;
  } catch (error) {
    log.error(sentence(asError(error)));
    return 1;
  } finally {
    await daemon.stop();
    stopNative();
    exitSoon();
  }
}
