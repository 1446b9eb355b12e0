import { VhostdError } from "../../base/errors.ts";
import { domainOptions } from "./domain-xml.ts";

/** One option of QEMU with its keys: `-device virtio-net-pci,netdev=n0`. What has no key is `""`. */
export interface QemuOption {
  /** Without dashes: "device". */
  readonly name: string;
  readonly values: ReadonlyMap<string, string>;
}

/** Options whose first value may stand without its key (QEMU, qemu-options.hx and each option's implied key). */
const FLAGS_WITHOUT_VALUE: ReadonlySet<string> = new Set([
  "S",
  "nodefaults",
  "daemonize",
  "no-user-config",
  "nographic",
]);

/** @param args all but the program's name */
export function parseQemuOptions(args: readonly string[]): QemuOption[] {
  const options: QemuOption[] = [];
  for (let at = 0; at < args.length; at++) {
    if (!args[at]!.startsWith("-")) continue;
    const name = args[at]!.replace(/^--?/, "");
    const next = args[at + 1];
    const hasValue = next !== undefined && !next.startsWith("-") && !FLAGS_WITHOUT_VALUE.has(name);
    options.push({ name, values: hasValue ? parseValues(next) : new Map() });
    if (hasValue) at++;
  }
  return options;
}

function parseValues(text: string): Map<string, string> {
  return text.startsWith("{") ? parseJson(text) : parseKeys(text);
}

/** libvirt writes `-device`, `-object` and others as JSON objects. */
function parseJson(text: string): Map<string, string> {
  let parsed: unknown;
  try {
    parsed = JSON.parse(text);
  } catch {
    return new Map([["", text]]);
  }
  const values = new Map<string, string>();
  const add = (prefix: string, value: unknown) => {
    if (typeof value === "object" && value !== null) {
      for (const [key, inner] of Object.entries(value)) add(prefix === "" ? key : `${prefix}.${key}`, inner);
    } else values.set(prefix, value === true ? "on" : value === false ? "off" : String(value));
  };
  add("", parsed);
  const main = values.get("driver") ?? values.get("qom-type") ?? values.get("backend") ?? values.get("type");
  if (main !== undefined) values.set("", main);
  return values;
}

/** `virtio-net-pci,netdev=n0,mq=on`; a comma in a value is written twice. */
function parseKeys(text: string): Map<string, string> {
  const values = new Map<string, string>();
  const parts = text.replaceAll(",,", "\0").split(",");
  for (const [index, part] of parts.entries()) {
    const [key = "", ...rest] = part.replaceAll("\0", ",").split("=");
    if (rest.length > 0) values.set(key, rest.join("="));
    else if (index === 0) values.set("", key);
    else values.set(key, "on");
  }
  const main = values.get("driver") ?? values.get("qom-type") ?? values.get("type");
  if (!values.has("") && main !== undefined) values.set("", main);
  return values;
}

/** The value of a key is on, in any of QEMU's spellings. */
export function isOn(values: ReadonlyMap<string, string>, key: string): boolean {
  return ["on", "yes", "true", "y"].includes(values.get(key) ?? "");
}

/** Bytes of "4G", "512" (MiB, as `-m` and `size` without a letter mean it is told by `unit`). */
export function parseSize(text: string, unit: number): number {
  const [, digits, letter = ""] = /^(\d+)([kmgt]?)/i.exec(text) ?? [];
  const units: Readonly<Record<string, number>> = { k: 2 ** 10, m: 2 ** 20, g: 2 ** 30, t: 2 ** 40 };
  return digits === undefined ? 0 : Number(digits) * (units[letter.toLowerCase()] ?? unit);
}

/**
 * Options out of a file: a command line as a shell takes it, a JSON list of its words, /proc/PID/cmdline as it is, or the XML
 * of a libvirt domain.
 * @throws VhostdError badArguments
 */
export function readQemuOptions(text: string): QemuOption[] {
  const trimmed = text.trim();
  if (trimmed.startsWith("<")) return parseQemuOptions(domainOptions(trimmed));
  const words = trimmed.includes("\0")
    ? trimmed.split("\0")
    : trimmed.startsWith("[")
      ? jsonWords(trimmed)
      : shellWords(trimmed);
  const options = parseQemuOptions(words);
  if (options.length > 0) return options;
  throw new VhostdError("badArguments", "there are no options of QEMU in it", {
    fix: "give a file with QEMU's command line (the log of libvirt has it), or the XML of the domain (virsh dumpxml)",
  });
}

function jsonWords(text: string): string[] {
  try {
    const words: unknown = JSON.parse(text);
    return Array.isArray(words) ? words.map(String) : [];
  } catch {
    return [];
  }
}

/** Words with quotes and backslashes taken away; nothing is expanded. */
function shellWords(text: string): string[] {
  const words: string[] = [];
  for (const [word] of text.replaceAll("\\\n", " ").matchAll(/(?:[^\s"'\\]|\\.|"(?:[^"\\]|\\.)*"|'[^']*')+/g)) {
    words.push(
      word.replace(/\\(.)|"((?:[^"\\]|\\.)*)"|'([^']*)'/g, (_, escaped, double, single) =>
        String(escaped ?? double?.replace(/\\(["\\$`])/g, "$1") ?? single),
      ),
    );
  }
  return words;
}
