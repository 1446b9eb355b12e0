import { fieldSize, readField } from "../base/layout.ts";
import type { ConfigTable, ConfigValues } from "../plugin.ts";

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
