import { Deadline } from "../base/deadline.ts";
import { asError } from "../base/errors.ts";
import { type CommandLine, parseCommandLine, UsageError } from "../command-line.ts";
import { RpcClient } from "../rpc/client.ts";
import { callDaemon, daemonPlace, EXIT_FAILURE, failureOf, printFailure, printJson } from "./daemon-call.ts";
import { DAEMON_OPTIONS } from "./main.ts";

const CALL_LINE: CommandLine<typeof DAEMON_OPTIONS> = {
  name: "vfe-vhost-cli call",
  summary: "Calls a method of the control interface and prints its result.",
  options: DAEMON_OPTIONS,
  positionals: [
    { name: "METHOD", help: "its name; rpc.discover describes them all" },
    { name: "JSON", help: "its parameters, an object" },
  ],
};

const EVENTS_LINE: CommandLine<typeof DAEMON_OPTIONS> = {
  name: "vfe-vhost-cli events",
  summary: "Prints what happens to PFs and VFs, one JSON object a line, until interrupted.",
  options: DAEMON_OPTIONS,
};

export async function runCall(args: readonly string[]): Promise<number> {
  const { values, positionals } = parseCommandLine(CALL_LINE, args);
  const [method, json = "{}"] = positionals;
  if (method === undefined) throw new UsageError("no method given", CALL_LINE);
  const place = daemonPlace(values, CALL_LINE);
  try {
    printJson(await callDaemon(place, method, parseParams(json)));
    return 0;
  } catch (error) {
    if (error instanceof UsageError) throw error;
    printFailure(failureOf(error));
    return EXIT_FAILURE;
  }
}

export async function runEvents(args: readonly string[]): Promise<number> {
  const { values } = parseCommandLine(EVENTS_LINE, args);
  const place = daemonPlace(values, EVENTS_LINE);
  try {
    const deadline = Deadline.after(place.timeout, "the subscription to events");
    using client = await RpcClient.connect(place.socket, deadline);
    client.onNotification((_, event) => process.stdout.write(`${JSON.stringify(event)}\n`));
    await client.call("events.subscribe", {}, deadline);
    throw await client.closed;
  } catch (error) {
    printFailure(failureOf(error));
    return EXIT_FAILURE;
  }
}

function parseParams(json: string): Record<string, unknown> {
  let params: unknown;
  try {
    params = JSON.parse(json);
  } catch (error) {
    throw new UsageError(`the parameters are not JSON: ${asError(error).message}`, CALL_LINE);
  }
  if (typeof params !== "object" || params === null || Array.isArray(params)) {
    throw new UsageError("the parameters are passed by name, in an object", CALL_LINE);
  }
  return params as Record<string, unknown>;
}
