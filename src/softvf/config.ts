import { dirname, join, resolve } from "node:path";
import Type, { type Static } from "typebox";
import { asError, VhostdError } from "../base/errors.ts";
import { LOG_LEVELS, type LogLevel } from "../base/log.ts";
import { type PciAddress, parsePciAddress } from "../pci/address.ts";
import type { SoftOptionValue } from "../plugin.ts";
import type { PluginRegistry } from "../plugin-host.ts";
import { findMismatch } from "../rpc/mismatch.ts";
import { allOptions, optionByFlag, optionFlag, optionsOfVf, parseOption } from "./class-options.ts";
import { PF_OPTIONS, PfSettings } from "./pf-options.ts";
import type { PfOptions } from "./physical-function.ts";

export const DEFAULT_SOFTVF_DIRECTORY = "/run/vfe-softvf";

/** The control socket of the softvf that runs in this directory. */
export function controlSocket(runtimeDirectory: string): string {
  return join(runtimeDirectory, "control.sock");
}

/** One PF as it was asked for; whether its class has these options is not known yet. */
export interface PfRequest {
  readonly address: PciAddress;
  readonly className: string;
  readonly vfs: number;
  /** As written, by flag: `block-size`. */
  readonly options: Readonly<Record<string, unknown>>;
  /** Where relative paths among them start. */
  readonly directory: string;
}

export interface SoftvfConfig {
  /** Absolute. */
  readonly runtimeDirectory: string;
  readonly logLevel: LogLevel;
  /** Absolute paths and npm names. */
  readonly plugins: readonly string[];
  /** Where npm names of plugins are resolved from. */
  readonly pluginDirectory: string | undefined;
  readonly pfs: readonly PfRequest[];
}

/** Of a PF for which nobody says otherwise. */
export const DEFAULT_VFS = 1;
/** What an SR-IOV capability can express (NumVFs). */
const VFS_MAX = 0xffff;

const exact = { additionalProperties: false } as const;
const Pf = Type.Object({
  address: Type.String({ description: "PCI address" }),
  class: Type.String({ description: "device class" }),
  vfs: Type.Optional(Type.Integer({ minimum: 0, maximum: VFS_MAX, description: "number of VFs" })),
});
const ConfigFile = Type.Object(
  {
    "runtime-dir": Type.Optional(Type.String({ minLength: 1 })),
    "log-level": Type.Optional(Type.Enum(Object.keys(LOG_LEVELS) as LogLevel[])),
    plugins: Type.Optional(Type.Array(Type.String({ minLength: 1, description: "path or npm name" }))),
    "plugin-directory": Type.Optional(Type.String({ minLength: 1 })),
    pf: Type.Array(Pf, { minItems: 1 }),
  },
  exact,
);
type ConfigFile = Static<typeof ConfigFile>;

/** @throws VhostdError badArguments with file and key */
export async function readConfigFile(file: string): Promise<SoftvfConfig> {
  let value: unknown;
  try {
    value = Bun.TOML.parse(await Bun.file(file).text());
  } catch (cause) {
    throw new VhostdError("badArguments", `${file}: ${asError(cause).message}`, { cause });
  }
  const mismatch = findMismatch(ConfigFile, value, "key");
  if (mismatch !== undefined) throw new VhostdError("badArguments", `${file}: ${mismatch.message}`);
  const config = value as ConfigFile;
  const here = dirname(resolve(file));
  const { plugins = [] } = config;
  const directory = config["plugin-directory"];
  return {
    runtimeDirectory: resolve(here, config["runtime-dir"] ?? DEFAULT_SOFTVF_DIRECTORY),
    logLevel: config["log-level"] ?? "info",
    plugins: plugins.map((plugin) => (/^[./]/.test(plugin) ? resolve(here, plugin) : plugin)),
    pluginDirectory: directory === undefined ? undefined : resolve(here, directory),
    pfs: config.pf.map(({ address, class: className, vfs = DEFAULT_VFS, ...options }, index) => ({
      address: parseAddress(address, `${file}: key "pf[${index}].address"`),
      className,
      vfs,
      options,
      directory: here,
    })),
  };
}

/** @throws VhostdError badArguments with the place */
function parseAddress(text: string, place: string): PciAddress {
  try {
    return parsePciAddress(text);
  } catch (cause) {
    throw new VhostdError("badArguments", `${place}: ${asError(cause).message}`, { cause });
  }
}

/** @throws VhostdError badArguments */
export function parseVfCount(text: string): number {
  const count = /^\d{1,5}$/.test(text) ? Number(text) : Number.NaN;
  if (count <= VFS_MAX) return count;
  throw new VhostdError("badArguments", `"${text}" is no number of VFs, must be from 0 to ${VFS_MAX}`);
}

/** Fits a request to the class that it names. @throws VhostdError badArguments */
export function resolvePf(
  { address, className, vfs, options, directory }: PfRequest,
  registry: PluginRegistry,
): PfOptions {
  const deviceClass = findClass(className, registry);
  const known = allOptions(deviceClass.softDevice);
  const values: Record<string, SoftOptionValue> = {};
  const pfValues: Record<string, SoftOptionValue> = {};
  for (const [flag, text] of Object.entries(options)) {
    const own = optionByFlag(PF_OPTIONS, flag);
    if (own !== undefined) {
      pfValues[own] = parseOption(flag, PF_OPTIONS[own], text, directory);
      continue;
    }
    const name = optionByFlag(known, flag);
    if (name === undefined) {
      throw new VhostdError("badArguments", `class ${className} has no option ${flag}`, {
        fix: `its options are: ${[...Object.keys(known), ...Object.keys(PF_OPTIONS)].map(optionFlag).join(", ")}`,
      });
    }
    values[name] = parseOption(flag, known[name]!, text, directory);
  }
  // Common options are the same for all VFs: what does not fit is said before anything is made.
  optionsOfVf(deviceClass.softDevice, values, { pf: address, vf: 0 });
  new PfSettings(pfValues);
  return { address, deviceClass, vfs, options: values, pfOptions: pfValues };
}

/** @throws VhostdError badArguments where there is no such class, or it has no software device */
export function findClass(className: string, registry: PluginRegistry): PfOptions["deviceClass"] {
  const { deviceClasses } = registry;
  const deviceClass = deviceClasses.find(({ name }) => name === className);
  if (deviceClass?.softDevice !== undefined) return { ...deviceClass, softDevice: deviceClass.softDevice };
  const soft = deviceClasses.filter(({ softDevice }) => softDevice !== undefined).map(({ name }) => name);
  throw new VhostdError("badArguments", `there is no software device of class "${className}"`, {
    fix: `choose one of: ${soft.join(", ")}; or name a plugin that brings it`,
  });
}
