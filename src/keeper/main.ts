import { resolve } from "node:path";
import { sentence, VhostdError } from "../base/errors.ts";
import { createLogger, LOG_LEVELS, type LogLevel } from "../base/log.ts";
import { type CommandLine, type Option, parseCommandLine, UsageError } from "../command-line.ts";
import { dieOfUnhandled, exitSoon, stopSignal } from "../process.ts";
import {
  DEFAULT_RUNTIME_DIRECTORY,
  keeperDirectory,
  keeperSocket,
  makeRuntimeDirectory,
} from "../runtime-directory.ts";
import { takeServiceEnvironment } from "../systemd/service-environment.ts";
import { BUILD_TIME, VERSION } from "../version.ts";
import { KEEPER_VERSION } from "./messages.ts";

const NAME = "vfe-vhostd-ha";

/** Open files beside those of records: sockets, what a message brings, what is still being closed, and what Bun has. */
const OWN_FILES = 1536;

const OPTIONS = {
  "runtime-dir": { type: "string", value: "DIR", help: `the daemon's, for the socket (${DEFAULT_RUNTIME_DIRECTORY})` },
  "log-level": { type: "string", value: "LEVEL", help: `${Object.keys(LOG_LEVELS).join(", ")} (info)` },
  version: { type: "boolean", help: "print the version and exit" },
} as const satisfies Record<string, Option>;

const COMMAND_LINE: CommandLine<typeof OPTIONS> = {
  name: NAME,
  summary:
    "Keeps what vfe-vhostd needs to go on after its own end: records, and the file descriptors that they speak of.",
  options: OPTIONS,
  notes: `Prints "ready DIR" when it can be connected to. SIGTERM and SIGINT stop it; what it keeps is gone then.`,
};

/** @returns the exit code. @throws UsageError, HelpRequest */
export async function runKeeper(args: readonly string[]): Promise<number> {
  try {
    return await serve(args);
  } catch (error) {
    if (!(error instanceof VhostdError)) throw error;
    process.stderr.write(`${NAME}: ${sentence(error)}\n`);
    return 1;
  }
}

async function serve(args: readonly string[]): Promise<number> {
  const { values } = parseCommandLine(COMMAND_LINE, args);
  if (values.version === true) {
    process.stdout.write(`${VERSION}\n`);
    return 0;
  }
  const level = values["log-level"] ?? "info";
  if (!Object.hasOwn(LOG_LEVELS, level)) {
    throw new UsageError(`"${level}" is not a log level: ${Object.keys(LOG_LEVELS).join(", ")}`, COMMAND_LINE);
  }
  const log = createLogger(level as LogLevel);
  dieOfUnhandled(log);
  const asked = stopSignal();
  const directory = resolve(values["runtime-dir"] ?? DEFAULT_RUNTIME_DIRECTORY);
  // Not before: --help and mistakes on the command line are answered where native/ is not built, too.
  const [{ KeeperServer }, { STORE_LIMITS, Store }, { lockDirectory, raiseOpenFileLimit }, { stopNative }, { Notify }] =
    await Promise.all([
      import("./keeper-server.ts"),
      import("./store.ts"),
      import("../native/sys.ts"),
      import("../native/stop.ts"),
      import("../systemd/notify.ts"),
    ]);
  await using running = new AsyncDisposableStack();
  running.defer(exitSoon);
  running.defer(stopNative);
  const notify = running.use(new Notify(takeServiceEnvironment(), log));
  running.defer(await makeRuntimeDirectory(directory, NAME));
  running.defer(await makeRuntimeDirectory(keeperDirectory(directory), NAME));
  const lock = lockDirectory(keeperDirectory(directory));
  if (lock === undefined) {
    throw new VhostdError("busy", `another keeper runs in ${directory} already`, {
      fix: "stop it first, or choose another directory with --runtime-dir",
    });
  }
  running.use(lock);
  const files = raiseOpenFileLimit();
  log.debug(`up to ${files} open files`);
  // A record is refused before there is no room for its fds: a message that they cannot be taken from is the last one.
  const totalFds = Math.min(STORE_LIMITS.totalFds, files - STORE_LIMITS.recordFds - OWN_FILES);
  const fix = "raise the limit of open files (LimitNOFILE of the service)";
  if (totalFds <= 0) throw new VhostdError("limitExceeded", `${files} open files are too few`, { fix });
  if (totalFds < STORE_LIMITS.totalFds) log.warn(`there is room for the fds of records up to ${totalFds} only; ${fix}`);
  const store = running.use(new Store({ ...STORE_LIMITS, totalFds }));
  const identity = { protocol: KEEPER_VERSION, version: VERSION, build: BUILD_TIME };
  running.use(
    new KeeperServer(store, { path: keeperSocket(directory), identity, log, user: process.geteuid?.() ?? 0 }),
  );
  process.stdout.write(`ready ${directory}\n`);
  notify.ready();
  log.info(`${await asked}: stopping`);
  notify.stopping();
  return 0;
}
