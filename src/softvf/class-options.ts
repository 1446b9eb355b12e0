import { resolve } from "node:path";
import { VhostdError } from "../base/errors.ts";
import type { PciAddress } from "../pci/address.ts";
import type { SoftDeviceClass, SoftOption, SoftOptionValue, SoftOptionValues } from "../plugin.ts";
import { isRingSize, RING_SIZE_MAX } from "../virtio/split-ring.ts";

/** Options that every soft device has; a class may put one of its own, by the same name, in the place of one. */
const COMMON_OPTIONS = {
  queues: { type: "number", description: "virtqueues (a class may add some of its own)", default: 1 },
  ringSize: { type: "number", description: "largest size of each ring, entries; a power of two", default: 256 },
  vectors: { type: "number", description: "MSI-X vectors; one for each queue and one for the configuration" },
} as const satisfies Readonly<Record<string, SoftOption>>;

const QUEUES_MAX = 1024;
const VECTORS_MAX = 2048;
/** What a number holds exactly. */
const SIZE_LIMIT = "at most 8191T";
const UNITS: Readonly<Record<string, number>> = { "": 1, K: 2 ** 10, M: 2 ** 20, G: 2 ** 30, T: 2 ** 40 };

/** Every option of a class's soft devices, by name. */
export function allOptions(softDevice: SoftDeviceClass): Readonly<Record<string, SoftOption>> {
  return { ...COMMON_OPTIONS, ...softDevice.options };
}

/** As people write it: `blockSize` is `block-size`. */
export function optionFlag(name: string): string {
  return name.replace(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`);
}

/** The option that is written so. */
export function optionByFlag<N extends string>(options: Readonly<Record<N, SoftOption>>, flag: string): N | undefined {
  return (Object.keys(options) as N[]).find((name) => optionFlag(name) === flag);
}

/**
 * A value as typed on a command line or in a file.
 * @param directory where relative paths start
 * @throws VhostdError badArguments
 */
export function parseOption(
  flag: string,
  { type, default: preset }: SoftOption,
  value: unknown,
  directory: string,
): SoftOptionValue {
  const refuse = (expected: string) =>
    new VhostdError("badArguments", `option ${flag} is ${JSON.stringify(value)}, must be ${expected}`);
  switch (type) {
    case "string":
    case "path":
      // Where nothing is the default it can be said.
      if (typeof value !== "string" || (value === "" && preset !== "") || value.includes("\0")) throw refuse("a text");
      return type === "path" ? resolve(directory, value) : value;
    case "boolean":
      if (typeof value === "boolean") return value;
      if (value === "true" || value === "on") return true;
      if (value === "false" || value === "off") return false;
      throw refuse("on or off");
    case "number": {
      const number = typeof value === "string" && /^\d+$/.test(value) ? Number(value) : value;
      if (typeof number !== "number" || !Number.isSafeInteger(number) || number < 0) throw refuse("a whole number");
      return number;
    }
    case "size": {
      if (typeof value === "number" && Number.isSafeInteger(value) && value >= 0) return value;
      const match = typeof value === "string" ? /^(\d+)([KMGT]?)(?:iB|B)?$/i.exec(value) : null;
      if (match === null) throw refuse("a size in bytes, or with K, M, G or T");
      const bytes = Number(match[1]) * UNITS[match[2]!.toUpperCase()]!;
      if (!Number.isSafeInteger(bytes)) throw refuse(SIZE_LIMIT);
      return bytes;
    }
  }
}

/**
 * Values for one VF: defaults filled in, in texts `{pf}` replaced by the PF's address and `{vf}` by the VF's number.
 * @throws VhostdError badArguments where a common option is out of range
 */
export function optionsOfVf(
  softDevice: SoftDeviceClass,
  given: SoftOptionValues,
  { pf, vf }: { readonly pf: PciAddress; readonly vf: number },
): SoftOptionValues {
  const placed = (text: string) => text.replaceAll("{pf}", pf).replaceAll("{vf}", String(vf));
  const values = Object.entries(allOptions(softDevice)).map(([name, option]) => {
    const value = given[name] ?? option.default;
    return [name, typeof value === "string" ? placed(value) : value] as const;
  });
  const options = Object.fromEntries(values);
  checkWithin("queues", options["queues"], 1, QUEUES_MAX);
  if (options["vectors"] !== undefined) checkWithin("vectors", options["vectors"], 1, VECTORS_MAX);
  if (!isRingSize(Number(options["ringSize"]))) {
    const limit = `a power of two up to ${RING_SIZE_MAX}`;
    throw new VhostdError("badArguments", `option ring-size is ${options["ringSize"]}, must be ${limit}`);
  }
  return options;
}

function checkWithin(flag: string, value: SoftOptionValue | undefined, low: number, high: number): void {
  if (typeof value === "number" && value >= low && value <= high) return;
  throw new VhostdError("badArguments", `option ${flag} is ${value}, must be from ${low} to ${high}`);
}
