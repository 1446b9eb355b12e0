import { parseArgs } from "node:util";
import { asError } from "./base/errors.ts";

/** One option of a program. */
export interface Option {
  readonly type: "boolean" | "string";
  readonly short?: string;
  /** May be given several times. */
  readonly multiple?: boolean;
  /** One of several of which a person gives one; shown so in the usage. */
  readonly exclusive?: boolean;
  /** What stands for the value in the help: `DIR`. */
  readonly value?: string;
  readonly help: string;
}

/** An argument that is no option. The last one of a command may be given several times. */
export interface Positional {
  readonly name: string;
  readonly help: string;
  readonly multiple?: boolean;
}

/** A program or one of its commands: what parsing and help are made from. */
export interface CommandLine<O extends Readonly<Record<string, Option>>> {
  /** As typed: `vfe-vhost-cli vf`. */
  readonly name: string;
  readonly summary: string;
  readonly options: O;
  readonly positionals?: readonly Positional[];
  /** Listed in the help; which of them is meant is for the program to find. */
  readonly commands?: readonly { readonly name: string; readonly help: string }[];
  /** Further text of the help. */
  readonly notes?: string;
}

type Value<T extends Option> = T["type"] extends "boolean"
  ? boolean
  : T extends { readonly multiple: true }
    ? readonly string[]
    : string;
export type OptionValues<O extends Readonly<Record<string, Option>>> = { readonly [K in keyof O]?: Value<O[K]> };

export interface Parsed<O extends Readonly<Record<string, Option>>> {
  readonly values: OptionValues<O>;
  readonly positionals: readonly string[];
}

/** The person typed something that the program does not take: exit code 2, with the usage. */
export class UsageError extends Error {
  constructor(
    message: string,
    readonly commandLine: CommandLine<Readonly<Record<string, Option>>>,
  ) {
    super(message);
    this.name = "UsageError";
  }
}

/** Thrown in place of a result where `--help` was given. */
export class HelpRequest extends Error {
  constructor(readonly text: string) {
    super("help");
    this.name = "HelpRequest";
  }
}

const EXIT_USAGE = 2;

/** @throws UsageError, HelpRequest */
export function parseCommandLine<const O extends Readonly<Record<string, Option>>>(
  commandLine: CommandLine<O>,
  args: readonly string[],
): Parsed<O> {
  const options = Object.fromEntries(
    Object.entries<Option>(commandLine.options).map(([name, { type, short, multiple = false }]) => [
      name,
      { type, multiple, ...(short === undefined ? {} : { short }) },
    ]),
  );
  let parsed: { readonly values: object; readonly positionals: readonly string[] };
  try {
    parsed = parseArgs({
      args: [...args],
      options: { ...options, help: { type: "boolean", short: "h" } },
      allowPositionals: true,
    });
  } catch (error) {
    throw new UsageError(asError(error).message.split(/\.? To specify|\n/)[0]!, commandLine);
  }
  if ("help" in parsed.values) throw new HelpRequest(formatHelp(commandLine));
  const taken = commandLine.positionals?.at(-1)?.multiple === true ? Infinity : (commandLine.positionals?.length ?? 0);
  if (parsed.positionals.length > taken) {
    throw new UsageError(`unexpected argument "${parsed.positionals[taken]}"`, commandLine);
  }
  return { values: parsed.values as OptionValues<O>, positionals: parsed.positionals };
}

type AnyCommandLine = CommandLine<Readonly<Record<string, Option>>>;

/** The first line of the help. */
function formatUsage({ name, options, positionals = [], commands }: AnyCommandLine): string {
  const all = Object.entries<Option>(options);
  const exclusive = all.filter(([, option]) => option.exclusive === true).map(formatFlag);
  const others = all.filter(([, option]) => option.exclusive !== true);
  return [
    `usage: ${name} [-h]`,
    ...(exclusive.length === 0 ? [] : [`[${exclusive.join(" | ")}]`]),
    ...others.map((entry) => `[${formatFlag(entry)}]${entry[1].multiple === true ? "…" : ""}`),
    ...(commands === undefined ? [] : ["COMMAND …"]),
    ...positionals.map(({ name: each, multiple }) => `[${each}]${multiple === true ? "…" : ""}`),
  ].join(" ");
}

function formatFlag([long, { short, value }]: [string, Option]): string {
  return `${short === undefined ? `--${long}` : `-${short}`}${value === undefined ? "" : ` ${value}`}`;
}

export function formatHelp(commandLine: AnyCommandLine): string {
  const { summary, options, positionals = [], commands = [], notes } = commandLine;
  const all: Record<string, Option> = { ...options, help: { type: "boolean", short: "h", help: "show this help" } };
  const flags = Object.entries(all).map(([long, { short, value, help }]) => {
    const forms = [...(short === undefined ? [] : [`-${short}`]), `--${long}`].join(", ");
    return { name: `${forms}${value === undefined ? "" : ` ${value}`}`, help };
  });
  return [
    formatUsage(commandLine),
    "",
    summary,
    ...formatSection("commands", commands),
    ...formatSection("arguments", positionals),
    ...formatSection("options", flags),
    ...(notes === undefined ? [] : ["", notes]),
  ].join("\n");
}

function formatSection(title: string, rows: readonly { readonly name: string; readonly help: string }[]): string[] {
  return rows.length === 0 ? [] : ["", `${title}:`, ...rows.map(({ name, help }) => `  ${name.padEnd(28)} ${help}`)];
}

/**
 * Runs the body of a program and sets the exit code: what it returns, 0 after help, 2 after a usage error.
 * Other errors are thrown on.
 */
export async function runProgram(body: () => Promise<number>): Promise<void> {
  try {
    process.exitCode = await body();
  } catch (error) {
    if (error instanceof HelpRequest) {
      process.stdout.write(`${error.text}\n`);
    } else if (error instanceof UsageError) {
      const { commandLine } = error;
      process.stderr.write(`${commandLine.name}: ${error.message}\n${formatUsage(commandLine)}\n`);
      process.exitCode = EXIT_USAGE;
    } else throw error;
  }
}
