import { isAbsolute } from "node:path";
import { parseArgs } from "node:util";
import { silentLogger } from "../../../src/base/log.ts";
import { parsePciAddress } from "../../../src/pci/address.ts";
import type { DeviceClass, SoftDevice, SoftDeviceClass, SoftOptionValues } from "../../../src/plugin.ts";
import { BUILT_IN_PLUGINS, PluginRegistry } from "../../../src/plugin-host.ts";
import { allOptions, optionByFlag, optionFlag, optionsOfVf, parseOption } from "../../../src/softvf/class-options.ts";
import type { VhostUserFrontend } from "../frontend/frontend.ts";

/** What is tried: a device class, and what its author says of it beside the class itself. */
export interface ConformanceSubject {
  /** Absolute path of the plugin. */
  readonly plugin: string;
  /** Which of the plugin's classes; needed where it brings several. */
  readonly className?: string;
  /**
   * Options of vfe-softvf with which a software device of the class is made: `["--disk", "/tmp/disk.img"]`. What they name
   * is written to. Left out where the class has no software device.
   */
  readonly softvf?: readonly string[];
  /** Feature bits that a guest is to see although the device lacks them. None unless said. */
  readonly added?: readonly number[];
  /** Feature bits that no guest is to see. None unless said. */
  readonly hidden?: readonly number[];
  /** Milliseconds that a message or a request may take; 2000 unless said: front-ends wait in their main loop. */
  readonly patience?: number;
  /** Has each queue that runs do something; called after each start. @throws where it does not */
  exercise?(frontend: VhostUserFrontend): Promise<void>;
}

export const PATIENCE = 2000;

/** A subject with its class. */
export interface LoadedSubject extends ConformanceSubject {
  readonly deviceClass: DeviceClass;
}

/** One thing that is demanded of every class. */
export interface Check {
  readonly name: string;
  /** What it is about: one that is about the software device is left out where there is none. */
  readonly of: "class" | "software device";
  /** @throws Error that says what is wrong with the class */
  run(subject: LoadedSubject): Promise<void>;
}

/** @throws VhostdError naming the plugin and what is wrong with it; Error where it brings no such class */
export async function load(subject: ConformanceSubject): Promise<LoadedSubject> {
  const { plugin, className } = subject;
  if (!isAbsolute(plugin)) {
    throw new Error(`plugin is "${plugin}", must be an absolute path: join(import.meta.dir, "index.ts")`);
  }
  const { deviceClasses } = await PluginRegistry.load({ plugins: [plugin] }, silentLogger);
  const found = deviceClasses.filter(({ name }) => className === undefined || name === className);
  const [deviceClass] = found;
  if (deviceClass !== undefined && found.length === 1) return { ...subject, deviceClass };
  const brought = deviceClasses.map(({ name }) => name).join(", ") || "none";
  throw new Error(`${plugin} brings the classes ${brought}: say which one is meant (className)`);
}

/** The plugin as both programs are told of it: they have those of this project anyhow. */
export function configuredPlugins({ plugin }: ConformanceSubject): string[] {
  return plugin.startsWith(`${BUILT_IN_PLUGINS}/`) ? [] : [plugin];
}

/** @throws Error where the class has no software device */
export function softClass({ deviceClass }: LoadedSubject): SoftDeviceClass {
  if (deviceClass.softDevice !== undefined) return deviceClass.softDevice;
  throw new Error(`class ${deviceClass.name} has no software device, but options for one are given (softvf)`);
}

/** What vfe-softvf would make the first VF of. @throws VhostdError badArguments */
export function softOptions(subject: LoadedSubject): SoftOptionValues {
  const known = allOptions(softClass(subject));
  const flags = Object.entries(known).map(([name, { type, default: preset }]) => {
    // As vfe-softvf reads them: a switch that is on needs a value to be put off.
    return [optionFlag(name), { type: type === "boolean" && preset !== true ? "boolean" : "string" }] as const;
  });
  const { values } = parseArgs({ args: [...(subject.softvf ?? [])], options: Object.fromEntries(flags) });
  const given = Object.entries(values).map(([flag, value]) => {
    const name = optionByFlag(known, flag)!;
    return [name, parseOption(flag, known[name]!, value, process.cwd())] as const;
  });
  return optionsOfVf(softClass(subject), Object.fromEntries(given), { pf: parsePciAddress("0000:00:00.0"), vf: 0 });
}

export function makeSoftDevice(subject: LoadedSubject): SoftDevice {
  return softClass(subject).create(softOptions(subject));
}
