import { asError, sentence } from "../base/errors.ts";
import { createLogger, LOG_LEVELS } from "../base/log.ts";
import { type CommandLine, type Option, parseCommandLine } from "../command-line.ts";
import { dieOfUnhandled, exitSoon, stopSignal } from "../process.ts";
import { DEFAULT_RUNTIME_DIRECTORY } from "../runtime-directory.ts";
import { takeServiceEnvironment } from "../systemd/service-environment.ts";
import { VERSION } from "../version.ts";
import {
  type DaemonConfig,
  DEFAULT_BUS_DIRECTORIES,
  DEFAULT_STATE_DIRECTORY,
  HA_KINDS,
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
  ha: { type: "string", value: "KIND", help: `what hides a restart from VMMs: ${HA_KINDS.join(", ")} (auto)` },
  version: { type: "boolean", help: "print the version and exit" },
} as const satisfies Record<string, Option>;

const COMMAND_LINE: CommandLine<typeof OPTIONS> = {
  name: "vfe-vhostd",
  summary: "Serves vhost-user front-ends by virtio PCI virtual functions.",
  options: OPTIONS,
  notes:
    'Prints "ready DIR" when the control interface is served. SIGTERM and SIGINT stop it; where a keeper has what it has, its VFs run on.',
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
      ha: values.ha,
    });
  } catch (error) {
    process.stderr.write(`${COMMAND_LINE.name}: ${sentence(asError(error))}\n`);
    return 1;
  }
  const log = createLogger(config.logLevel);
  dieOfUnhandled(log);
  const asked = stopSignal();
  // Not before: --help and mistakes in the configuration are answered where native/ is not built, too.
  const [{ Daemon }, { stopNative }, { Notify }] = await Promise.all([
    import("./daemon.ts"),
    import("../native/stop.ts"),
    import("../systemd/notify.ts"),
  ]);
  const environment = takeServiceEnvironment();
  using notify = new Notify(environment, log);
  const daemon = new Daemon(config, log, deadlines, environment);
  let code = 1;
  try {
    await daemon.start();
    process.stdout.write(`ready ${config.runtimeDirectory}\n`);
    notify.ready();
    log.info(`version ${VERSION} serves ${config.runtimeDirectory}`);
    log.info(`${await Promise.race([asked, daemon.ended])}: stopping`);
    code = 0;
  } catch (error) {
    log.error(sentence(asError(error)));
  }
  notify.stopping();
  if ((await daemon.stop()) === "kept") process.exit(code);
  stopNative();
  exitSoon();
  return code;
}
