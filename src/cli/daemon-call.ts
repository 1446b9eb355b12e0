import { Deadline } from "../base/deadline.ts";
import { VhostdError } from "../base/errors.ts";
import { type CommandLine, type Option, type OptionValues, UsageError } from "../command-line.ts";
import { RpcClient } from "../rpc/client.ts";
import { DEFAULT_RUNTIME_DIRECTORY, rpcSocket } from "../runtime-directory.ts";
import type { DAEMON_OPTIONS } from "./main.ts";

const DEFAULT_TIMEOUT = 125;
const LONGEST_TIMEOUT = 86_400;

/** Exit code of everything that went wrong after the command line was understood. */
export const EXIT_FAILURE = 1;

/** The daemon that a command line means. */
export interface DaemonPlace {
  readonly socket: string;
  /** Milliseconds. */
  readonly timeout: number;
}

/** @throws UsageError */
export function daemonPlace(
  values: OptionValues<typeof DAEMON_OPTIONS>,
  commandLine: CommandLine<Readonly<Record<string, Option>>>,
): DaemonPlace {
  const seconds = Number(values.timeout ?? DEFAULT_TIMEOUT);
  if (!(seconds > 0 && seconds <= LONGEST_TIMEOUT)) {
    throw new UsageError(`--timeout is "${values.timeout}", expected seconds, more than 0`, commandLine);
  }
  const fromEnvironment = process.env["VFE_VHOSTD_RUNTIME_DIR"];
  const directory = values["runtime-dir"] ?? (fromEnvironment || DEFAULT_RUNTIME_DIRECTORY);
  return { socket: rpcSocket(directory), timeout: seconds * 1000 };
}

/** @throws VhostdError */
export async function callDaemon(
  place: DaemonPlace,
  method: string,
  params: Readonly<Record<string, unknown>>,
): Promise<unknown> {
  const deadline = Deadline.after(place.timeout, `the call of ${method}`);
  using client = await RpcClient.connect(place.socket, deadline);
  try {
    return await client.call(method, params, deadline);
  } catch (error) {
    if (!(error instanceof VhostdError) || error.code !== "timedOut") throw error;
    throw new VhostdError("timedOut", error.message, {
      fix: "the daemon goes on with it: ask for the state (vf -i, mgmtpf -l), or wait longer with --timeout",
    });
  }
}

/** JSON indented by two, as old clients print it. */
export function printJson(value: unknown): void {
  process.stdout.write(`${JSON.stringify(value, undefined, 2)}\n`);
}

/** One sentence, the number, and what to do. */
export function printFailure(error: {
  readonly message: string;
  readonly number: number;
  readonly fix?: string;
}): void {
  const fix = error.fix === undefined ? "" : `; ${error.fix}`;
  process.stderr.write(`vfe-vhost-cli: ${error.message} (error ${error.number})${fix}\n`);
}

/** For printFailure. */
export function failureOf(error: unknown): { message: string; number: number; fix?: string } {
  if (!(error instanceof VhostdError)) throw error;
  const { message, number, fix } = error;
  return fix === undefined ? { message, number } : { message, number, fix };
}
