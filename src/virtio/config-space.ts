import { VhostdError } from "../base/errors.ts";
import { fieldSize, readField } from "../base/layout.ts";
import type { ConfigTable, ConfigValues, DeviceClass } from "../plugin.ts";

/** Bytes that a class's configuration space table covers. */
export function configSize(table: ConfigTable): number {
  return Math.max(0, ...Object.values(table).map(([offset, type]) => offset + fieldSize(type)));
}

/** The fields of a device configuration space by name; what `bytes` does not reach reads as 0. */
export function configValues(table: ConfigTable, bytes: Uint8Array): ConfigValues {
  const padded = new Uint8Array(configSize(table));
  padded.set(bytes.subarray(0, padded.length));
  return Object.fromEntries(
    Object.entries(table).map(([name, [offset, type]]) => [name, readField(padded, offset, type)]),
  );
}

/**
 * A device configuration space without what may be another value where a device goes on with a state.
 * @param features as negotiated
 */
export function comparedBytes(
  { configSpace, comparedConfig }: Pick<DeviceClass, "configSpace" | "comparedConfig">,
  features: bigint,
  bytes: Uint8Array,
): Uint8Array {
  if (comparedConfig === undefined) return bytes;
  const kept = new Uint8Array(bytes.length);
  for (const name of comparedConfig(features)) {
    const field = configSpace[name];
    if (field === undefined) throw new VhostdError("invalid", `the configuration space has no field "${name}"`);
    const [offset, type] = field;
    kept.set(bytes.subarray(offset, offset + fieldSize(type)), offset);
  }
  return kept;
}
