import { Deadline } from "../base/deadline.ts";
import { VhostdError } from "../base/errors.ts";
import { type CommandLine, parseCommandLine } from "../command-line.ts";
import { callDaemon, type DaemonPlace, daemonPlace, EXIT_FAILURE, failureOf, printFailure } from "./daemon-call.ts";
import { DAEMON_OPTIONS } from "./main.ts";

const COMMAND_LINE: CommandLine<typeof DAEMON_OPTIONS> = {
  name: "vfe-vhost-cli upgrade",
  summary: "Has the daemon end so that the one that is installed now goes on with everything, and waits for that.",
  options: DAEMON_OPTIONS,
  notes:
    "Nothing happens where no keeper (vfe-vhostd-ha) has what the daemon has. The next daemon is started by who supervises it: systemd, with the unit of the package.",
};

/** Milliseconds between two looks for the next daemon. */
const INTERVAL = 50;
/** Milliseconds for one look: the daemon that ends may have taken the connection with it. */
const LOOK_TIMEOUT = 2_000;

/** What is looked at of the answer to "stats" and "vf.list". */
interface Answers {
  readonly stats: { readonly pid: number };
  readonly version: { readonly version: string };
  readonly list: { readonly vfs: readonly unknown[]; readonly left: readonly { readonly state: string }[] };
}

/** @returns the exit code. @throws UsageError, HelpRequest */
export async function runUpgrade(args: readonly string[]): Promise<number> {
  const { values } = parseCommandLine(COMMAND_LINE, args);
  const place = daemonPlace(values, COMMAND_LINE);
  try {
    const deadline = Deadline.after(place.timeout, "the upgrade of the daemon");
    const { pid } = await ask(place, "stats");
    const before = await ask(place, "version");
    await callDaemon(place, "upgrade", {});
    await deadline
      .poll(() => isAnother(place, pid), INTERVAL)
      .catch((cause) => {
        throw new VhostdError("timedOut", `process ${pid} has ended, and no other daemon serves ${place.socket}`, {
          fix: "start it (systemctl start vfe-vhostd); its VFs run on meanwhile",
          cause,
        });
      });
    const list = await deadline.poll(() => allTakenUp(place), INTERVAL);
    const after = await ask(place, "version");
    process.stdout.write(`${before.version} → ${after.version}, ${list.vfs.length} VFs\n`);
    const failed = list.left.length;
    if (failed === 0) return 0;
    process.stderr.write(`vfe-vhost-cli: ${failed} VFs could not be taken up: vfe-vhost-cli doctor\n`);
  } catch (error) {
    printFailure(failureOf(error));
  }
  return EXIT_FAILURE;
}

async function isAnother(place: DaemonPlace, pid: number): Promise<true | undefined> {
  const stats = await ask({ ...place, timeout: LOOK_TIMEOUT }, "stats").catch(() => undefined);
  return stats !== undefined && stats.pid !== pid ? true : undefined;
}

async function allTakenUp(place: DaemonPlace): Promise<Answers["list"] | undefined> {
  const list = (await callDaemon(place, "vf.list", {})) as Answers["list"];
  return list.left.some(({ state }) => state === "adopting") ? undefined : list;
}

async function ask<M extends "stats" | "version">(place: DaemonPlace, method: M): Promise<Answers[M]> {
  return (await callDaemon(place, method, {})) as Answers[M];
}
