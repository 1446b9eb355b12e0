import Type from "typebox";
import { asError, VhostdError } from "../base/errors.ts";
import { parsePciAddress } from "../pci/address.ts";
import type { SoftOption } from "../plugin.ts";
import { withDiscovery } from "../rpc/discover.ts";
import { defineMethod, type Method } from "../rpc/method.ts";
import { VERSION } from "../version.ts";
import { configValues } from "../virtio/config-space.ts";
import { describeFeatures } from "../virtio/features.ts";
import { allOptions, optionByFlag, optionFlag, parseOption } from "./class-options.ts";
import { PF_OPTIONS } from "./pf-options.ts";
import type { ServedFunction } from "./physical-function.ts";

const exact = { additionalProperties: false } as const;
const NoParams = Type.Object({}, exact);

export const FunctionInfo = Type.Object({
  address: Type.String(),
  class: Type.String(),
  /** Left out for a PF. */
  pf: Type.Optional(Type.String()),
  client: Type.Boolean({ description: "somebody has the function" }),
  status: Type.Integer({ description: "device status" }),
  /** Left out for a PF. */
  internal: Type.Optional(Type.String({ description: "internal status: init, running, quiesced or freezed" })),
  features: Type.Array(Type.String(), { description: "negotiated features" }),
  queues: Type.Array(Type.Integer(), { description: "queues in use" }),
  /** Left out where the class knows no link. */
  link: Type.Optional(Type.Boolean({ description: "the device reaches the world outside" })),
  /** Left out for a VF, and for a PF without an admin virtqueue. */
  admin: Type.Optional(
    Type.Object(
      {
        commands: Type.Integer({ description: "admin commands answered since the PF was made" }),
        microseconds: Type.Integer({ description: "from taking to answering them, each for itself" }),
        busyMicroseconds: Type.Integer({ description: "in which at least one was under way" }),
      },
      { description: "time that admin commands took" },
    ),
  ),
});

export const FunctionStats = Type.Object({
  address: Type.String(),
  queues: Type.Array(
    Type.Object({
      received: Type.Integer({ description: "descriptor chains taken" }),
      completed: Type.Integer({ description: "descriptor chains given back" }),
      bad: Type.Integer({ description: "of these malformed or failed" }),
      bytes: Type.Integer({ description: "data moved" }),
    }),
  ),
});

/** The methods of the control socket. */
export function controlMethods(functions: () => readonly ServedFunction[]): Method[] {
  const find = (text: string): ServedFunction => {
    const address = parsePciAddress(text);
    const found = functions().find((served) => served.address === address);
    if (found !== undefined) return found;
    throw new VhostdError("vfNotFound", `${address} is not served here`, { fix: "see vfe-softvf list" });
  };
  return withDiscovery({ title: "vfe-softvf", version: VERSION }, [
    defineMethod({
      name: "list",
      summary: "Lists all functions, each PF before its VFs.",
      params: NoParams,
      result: Type.Array(FunctionInfo),
      handler: () => functions().map(describeFunction),
    }),
    defineMethod({
      name: "stats",
      summary: "Counts what the VFs have done since they were made.",
      params: NoParams,
      result: Type.Array(FunctionStats),
      handler: () =>
        functions()
          .filter(({ pf }) => pf !== undefined)
          .map(({ address, fn }) => ({ address, queues: fn.stats().map((queue) => ({ ...queue })) })),
    }),
    defineMethod({
      name: "set",
      summary: "Changes options of a VF, or of its PF, while it runs.",
      params: Type.Object(
        {
          address: Type.String({ description: "PCI address" }),
          options: Type.Record(Type.String(), Type.Union([Type.String(), Type.Number(), Type.Boolean()])),
        },
        exact,
      ),
      result: Type.Object({}),
      changes: () => true,
      handler: async ({ address, options }) => {
        await setOptions(find(address), options);
        return {};
      },
    }),
  ]);
}

/** All names and values are checked before the first is set. */
async function setOptions(served: ServedFunction, options: Readonly<Record<string, unknown>>): Promise<void> {
  const { address, fn } = served;
  const changes = Object.entries(options).map(([flag, text]) => {
    const { name, option } = findLiveOption(flag, served);
    return { flag, name, value: parseOption(flag, option, text, process.cwd()) };
  });
  const refuse = (error: unknown, note = "") =>
    new VhostdError("invalid", `${address}: ${asError(error).message}${note}`, { cause: error });
  for (const { name, value } of changes) {
    try {
      fn.check(name, value);
    } catch (error) {
      throw refuse(error, changes.length > 1 ? "; nothing was set" : "");
    }
  }
  for (const [index, { name, value }] of changes.entries()) {
    try {
      await fn.set(name, value);
    } catch (error) {
      const before = changes.slice(0, index).map(({ flag }) => flag);
      throw refuse(error, before.length === 0 ? "" : `; set before that: ${before.join(", ")}`);
    }
  }
}

/** @throws VhostdError badArguments with what there is instead */
function findLiveOption(flag: string, { pf, deviceClass }: ServedFunction) {
  const known: Readonly<Record<string, SoftOption>> =
    pf === undefined ? PF_OPTIONS : allOptions(deviceClass.softDevice);
  const name = optionByFlag(known, flag);
  const option = name === undefined ? undefined : known[name];
  if (name !== undefined && option?.live === true) return { name, option };
  const live = Object.keys(known)
    .filter((each) => known[each]!.live === true)
    .map(optionFlag)
    .join(", ");
  if (option === undefined) {
    const owner = pf === undefined ? "a PF" : `class ${deviceClass.name}`;
    throw new VhostdError("badArguments", `${owner} has no option ${flag}`, {
      fix: `there are, to be set while the device runs: ${live}`,
    });
  }
  throw new VhostdError("badArguments", `option ${flag} cannot be set while the device runs`, {
    fix: `these can: ${live}`,
  });
}

function describeFunction({ address, pf, fn, server, deviceClass, commandTimes }: ServedFunction) {
  const { status, internalStatus, features, driverFeatures, enabledQueues } = fn.virtio;
  const config = configValues(deviceClass.configSpace, fn.deviceConfig());
  const link = pf === undefined ? undefined : deviceClass.linkUp?.(config, features);
  return {
    address,
    class: deviceClass.name,
    ...(pf === undefined ? {} : { pf }),
    client: server.busy,
    status,
    ...(pf === undefined ? {} : { internal: internalStatus }),
    features: describeFeatures(driverFeatures, deviceClass.features.names),
    queues: enabledQueues,
    ...(link === undefined ? {} : { link }),
    ...(commandTimes === undefined ? {} : { admin: commandTimes() }),
  };
}
