/** What systemd tells a service by variables of its environment (systemd.exec(5), sd_listen_fds(3), sd_watchdog_enabled(3)). */
export interface ServiceEnvironment {
  /** Where notifications go; undefined where nobody asked for them. */
  readonly notifySocket: string | undefined;
  /** Milliseconds, in which systemd wants to hear of this process. */
  readonly watchdog: number | undefined;
  /** How many fds systemd stores for this service; undefined where it does not say (before version 254). */
  readonly fdStoreMax: number | undefined;
  /** Names of the fds that were handed to this process, which are 3 and the following. */
  readonly listenNames: readonly string[];
}

/** Of a process that systemd does not know. */
export const NO_SERVICE: ServiceEnvironment = {
  ...{ notifySocket: undefined, watchdog: undefined, fdStoreMax: undefined },
  listenNames: [],
};

const VARIABLES = [
  "NOTIFY_SOCKET",
  "WATCHDOG_USEC",
  "WATCHDOG_PID",
  "FDSTORE",
  "LISTEN_PID",
  "LISTEN_FDS",
  "LISTEN_FDNAMES",
] as const;

/**
 * Reads the variables, and takes them away: they are not meant for processes that this one starts (with process.env, as
 * node:child_process does; Bun.spawn by itself gives them what this process was started with).
 */
export function takeServiceEnvironment(
  environment: Record<string, string | undefined> = process.env,
  pid = process.pid,
): ServiceEnvironment {
  const value = Object.fromEntries(VARIABLES.map((name) => [name, environment[name]]));
  for (const name of VARIABLES) delete environment[name];
  const watched = value["WATCHDOG_PID"] === undefined || Number(value["WATCHDOG_PID"]) === pid;
  const watchdog = watched ? positive(value["WATCHDOG_USEC"]) : undefined;
  const handed = Number(value["LISTEN_PID"]) === pid ? (positive(value["LISTEN_FDS"]) ?? 0) : 0;
  const names = value["LISTEN_FDNAMES"]?.split(":") ?? [];
  return {
    notifySocket: value["NOTIFY_SOCKET"] || undefined,
    watchdog: watchdog === undefined ? undefined : watchdog / 1000,
    fdStoreMax: positive(value["FDSTORE"]),
    listenNames: names.slice(0, handed),
  };
}

function positive(text: string | undefined): number | undefined {
  const value = Number(text);
  return Number.isSafeInteger(value) && value > 0 ? value : undefined;
}
