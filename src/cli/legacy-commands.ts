import { resolve } from "node:path";
import { type CommandLine, type Option, type OptionValues, parseCommandLine, UsageError } from "../command-line.ts";
import {
  callDaemon,
  type DaemonPlace,
  daemonPlace,
  EXIT_FAILURE,
  failureOf,
  printFailure,
  printJson,
} from "./daemon-call.ts";
import { printWarning } from "./machine-output.ts";
import { DAEMON_OPTIONS } from "./main.ts";

/** The commands of the existing stack's client: same words, same output. */

const DEVICE = { name: "DEVICE", help: "PCI address, 0000:af:04.5 or af:04.5" };

const VERSION_LINE: CommandLine<typeof DAEMON_OPTIONS> = {
  name: "vfe-vhost-cli version",
  summary: "Shows the versions of the daemon and its keeper.",
  options: DAEMON_OPTIONS,
};

const PF_OPTIONS = {
  add: { type: "boolean", short: "a", exclusive: true, help: "take the PF into service" },
  remove: { type: "boolean", short: "r", exclusive: true, help: "let go of the PF; its VFs must be removed before" },
  list: { type: "boolean", short: "l", exclusive: true, help: "list the PFs in service" },
  ...DAEMON_OPTIONS,
} as const satisfies Record<string, Option>;

const PF_LINE: CommandLine<typeof PF_OPTIONS> = {
  name: "vfe-vhost-cli mgmtpf",
  summary: "Adds, removes or lists physical functions.",
  options: PF_OPTIONS,
  positionals: [DEVICE],
};

const VF_OPTIONS = {
  add: { type: "boolean", short: "a", exclusive: true, help: "take the VF into service; its PF must be added before" },
  remove: { type: "boolean", short: "r", exclusive: true, help: "let go of the VF" },
  list: { type: "boolean", short: "l", exclusive: true, help: "list the VFs of the PF named by DEVICE" },
  info: { type: "boolean", short: "i", exclusive: true, help: "describe the VF and what its queues have done" },
  debug: {
    type: "boolean",
    short: "d",
    exclusive: true,
    help: "move the state of a managed VF, or log what it writes, by hand; a guest stands still while it is quiesced or frozen",
  },
  operation: {
    type: "string",
    short: "o",
    value: "OP",
    help: "of -d: 1 run, 2 quiesce, 3 freeze, 4 start logging, 5 stop logging, 6 status",
  },
  "size-mode": {
    type: "string",
    short: "b",
    value: "SIZE_MODE",
    help: "of -d -o 4: 1 bitmap, 2 bytemap, where the VF can",
  },
  socket: { type: "string", short: "v", value: "VHOST_SOCKET", help: "of -a: vhost-user socket (/tmp/vf-ADDRESS)" },
  uuid: { type: "string", short: "u", value: "VM_UUID", help: "of -a: the VM; its VFs share one view of its memory" },
  server: { type: "boolean", help: "of -a: listen at the socket instead of connecting to it" },
  unmanaged: {
    type: "boolean",
    help: "of -a: without a PF, by its own registers, not for migration; of -l without DEVICE: those added so",
  },
  force: {
    type: "boolean",
    help: "of -r: also while its VM is being migrated: one that arrives may lack what the VF has written",
  },
  frontend: {
    type: "string",
    value: "KIND",
    help: "of -a: standard, or nvidia-presetup: NVIDIA's QEMU with early set-up",
  },
  "no-host-notifier": { type: "boolean", help: "of -a: no front-end is given the function's doorbells to map" },
  ...DAEMON_OPTIONS,
} as const satisfies Record<string, Option>;

const VF_LINE: CommandLine<typeof VF_OPTIONS> = {
  name: "vfe-vhost-cli vf",
  summary: "Adds, removes, lists or describes virtual functions.",
  options: VF_OPTIONS,
  positionals: [DEVICE],
};

export async function runVersion(args: readonly string[]): Promise<number> {
  const { values } = parseCommandLine(VERSION_LINE, args);
  return await perform(daemonPlace(values, VERSION_LINE), "version", {});
}

export async function runMgmtpf(args: readonly string[]): Promise<number> {
  const { values, positionals } = parseCommandLine(PF_LINE, args);
  const operation = operationOf(values, ["add", "remove", "list"], PF_LINE);
  return await perform(daemonPlace(values, PF_LINE), "mgmtpf", { [operation]: true, dev: positionals[0] });
}

export async function runVf(args: readonly string[]): Promise<number> {
  const { values, positionals } = parseCommandLine(VF_LINE, args);
  const operation = operationOf(values, ["add", "remove", "list", "info", "debug"], VF_LINE);
  const [device] = positionals;
  const params = {
    [operation]: true,
    ...(operation === "list" ? { mgmtpf: device, unmanaged: values.unmanaged } : { vfdev: device }),
    ...(operation === "add" ? addParams(values) : {}),
    ...(operation === "remove" ? { force: values.force } : {}),
    ...(operation === "debug" ? { test_operation: values.operation, size_mode: values["size-mode"] } : {}),
  };
  return await perform(daemonPlace(values, VF_LINE), "vf", params);
}

function addParams(values: OptionValues<typeof VF_OPTIONS>) {
  return {
    // The daemon's working directory is not the caller's.
    socket_file: values.socket === undefined || values.socket === "" ? values.socket : resolve(values.socket),
    uuid: values.uuid,
    server: values.server,
    unmanaged: values.unmanaged,
    host_notifier: values["no-host-notifier"] === true ? false : undefined,
    frontend: values.frontend,
  };
}

function operationOf<const O extends string>(
  values: { readonly [K in O]?: boolean },
  all: readonly O[],
  commandLine: CommandLine<Readonly<Record<string, Option>>>,
): O {
  const asked = all.filter((operation) => values[operation] === true);
  const [operation] = asked;
  if (operation === undefined || asked.length > 1) {
    const options = all.map((name) => `--${name}`).join(", ");
    throw new UsageError(`give one of ${options}; given: ${asked.length}`, commandLine);
  }
  return operation;
}

/** What every method of the existing stack answers. */
interface Answer {
  readonly errno: number;
  readonly errstr: string;
  readonly fix?: string;
  readonly warning?: string;
}

/** Prints the result, a warning and the sentence of a failure on standard error. Undefined parameters are left out by JSON. */
async function perform(place: DaemonPlace, method: string, params: Readonly<Record<string, unknown>>): Promise<number> {
  const { fix, warning, ...result } = await answerOf(place, method, params);
  printJson(result);
  if (warning !== undefined) printWarning(warning);
  if (result.errno === 0) return 0;
  const failure = { message: result.errstr, number: -result.errno };
  printFailure(fix === undefined ? failure : { ...failure, fix });
  return EXIT_FAILURE;
}

/** A daemon that cannot be asked is a result too: scripts read errno from standard output. */
async function answerOf(
  place: DaemonPlace,
  method: string,
  params: Readonly<Record<string, unknown>>,
): Promise<Answer> {
  try {
    return (await callDaemon(place, method, params)) as Answer;
  } catch (error) {
    const { message, number, ...rest } = failureOf(error);
    return { errno: -number, errstr: message, ...rest };
  }
}
