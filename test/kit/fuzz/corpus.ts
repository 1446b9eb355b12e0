import { mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";

/** Where inputs that once failed are kept, one file each. People commit them. */
export const CORPUS_DIRECTORY = join(import.meta.dir, "../../fuzz/corpus");

/** A failure as it is kept: what people read, and the input as plain JSON (see `toPlain`). */
export interface CorpusEntry {
  readonly property: string;
  /** Seed of the run that found it. */
  readonly seed: number;
  readonly error: string;
  readonly input: unknown;
}

/** Inputs that are kept for a property, oldest name first. */
export function readCorpus(property: string, directory: string): unknown[] {
  return readdirSync(directory)
    .filter((name) => name.endsWith(".json"))
    .sort()
    .map((name) => JSON.parse(readFileSync(join(directory, name), "utf8")) as CorpusEntry)
    .filter((entry) => entry.property === property)
    .map((entry) => fromPlain(entry.input));
}

/** Keeps an input. The same one has the same name. @returns the path */
export function addToCorpus(entry: CorpusEntry, directory: string): string {
  mkdirSync(directory, { recursive: true });
  const input = toPlain(entry.input);
  const name = entry.property.toLowerCase().replace(/[^a-z0-9]+/g, "-");
  const path = join(directory, `${name}-${Bun.hash.crc32(JSON.stringify(input)).toString(16).padStart(8, "0")}.json`);
  writeFileSync(path, `${JSON.stringify({ ...entry, input }, null, 2)}\n`);
  return path;
}

/** What JSON lacks is written as an object of one member: {"$bigint": "0x2a"}, {"$bytes": "00ff"}, {"$undefined": true}. */
function toPlain(value: unknown): unknown {
  if (typeof value === "bigint") return { $bigint: value < 0n ? `${value}` : `0x${value.toString(16)}` };
  if (typeof value === "number" && !Number.isFinite(value)) return { $number: String(value) };
  if (Object.is(value, -0)) return { $number: "-0" };
  if (value === undefined) return { $undefined: true };
  if (value instanceof Uint8Array) return { $bytes: value.toHex() };
  if (value instanceof Date) return { $date: Number(value) };
  if (Array.isArray(value)) return value.map(toPlain);
  if (typeof value !== "object" || value === null) return value;
  const members = Object.entries(value).map(([name, member]) => [name, toPlain(member)] as const);
  return members.some(([name]) => name.startsWith("$")) ? { $entries: members } : Object.fromEntries(members);
}

function fromPlain(value: unknown): unknown {
  if (Array.isArray(value)) return value.map(fromPlain);
  if (typeof value !== "object" || value === null) return value;
  const members = Object.entries(value);
  const [kind, content] = members[0] ?? [];
  switch (kind) {
    case "$bigint":
      return BigInt(content);
    case "$number":
      return Number(content);
    case "$bytes":
      return Uint8Array.fromHex(content);
    case "$date":
      return new Date(content);
    case "$undefined":
      return undefined;
    case "$entries":
      return Object.fromEntries((content as [string, unknown][]).map(([name, member]) => [name, fromPlain(member)]));
    default:
      return Object.fromEntries(members.map(([name, member]) => [name, fromPlain(member)]));
  }
}
