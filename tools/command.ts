import { join } from "node:path";
import { parseArgs } from "node:util";
import { type ArgsDef, type CommandDef, defineCommand, type ParsedArgs, renderUsage, runCommand } from "citty";

/** The top of the checkout. */
export const ROOT = join(import.meta.dir, "..");

/** A failure that the person at the terminal can act on: its text is shown, its stack is not. */
export class Failure extends Error {}

/** Runs a command in the checkout with our terminal. @returns its exit code */
export async function run(command: readonly string[], environment: Record<string, string> = {}): Promise<number> {
  const child = Bun.spawn([...command], {
    cwd: ROOT,
    env: { ...process.env, ...environment },
    stdio: ["inherit", "inherit", "inherit"],
  });
  return child.exited;
}

/** Runs a command that is shown only when it fails. @returns its standard output. @throws Failure with what it wrote */
export async function runQuietly(
  command: readonly string[],
  environment: Record<string, string> = {},
): Promise<string> {
  const child = Bun.spawn([...command], {
    cwd: ROOT,
    env: { ...process.env, ...environment },
    stdio: ["ignore", "pipe", "pipe"],
  });
  const [text, errors, code] = await Promise.all([child.stdout.text(), child.stderr.text(), child.exited]);
  if (code !== 0) throw new Failure(`${command.join(" ")} ended with ${code}\n${text}${errors}`);
  return text;
}

/** The person typed something that the command does not take: exit code 2, with the usage. */
export class UsageError extends Error {}

const EXIT_USAGE = 2;
const HELP = ["--help", "-h"];

/** What `./dev NAME` does. */
export interface Task<A extends ArgsDef> {
  readonly name: string;
  readonly description: string;
  /** Options, and at most one positional, which takes any number of words (`args._`). */
  readonly args?: A;
  /** @returns the exit code. @throws Failure, UsageError */
  run(args: ParsedArgs<A>): Promise<number>;
}

export function defineTask<const A extends ArgsDef = Record<string, never>>(task: Task<A>): CommandDef {
  const { name, description, args = {} as A, run: action } = task;
  const command = defineCommand<A>({
    meta: { name, description },
    args,
    run: (context) => {
      refuseUnknown(args, context.rawArgs);
      return action(context.args);
    },
  });
  // Citty parses what the command declares; for whoever starts it one is like the other.
  return command as unknown as CommandDef;
}

/**
 * Runs the task that the first word names and ends the program with its exit code: 2 for what was typed wrong, 1 for a
 * Failure.
 */
export async function runTask(
  tasks: Readonly<Record<string, () => Promise<CommandDef>>>,
  [name = "", ...words]: readonly string[],
): Promise<never> {
  const all = defineCommand({
    meta: { name: "./dev", description: "Everything a developer does with vhostd" },
    subCommands: tasks,
  });
  const load = Object.hasOwn(tasks, name) ? tasks[name] : undefined;
  if (load === undefined) {
    if (HELP.includes(name)) return exitWithUsage(all);
    return exitWithUsage(all, undefined, name === "" ? "which command?" : `there is no command "${name}"`);
  }
  const task = await load();
  if (words.some((word) => HELP.includes(word))) return exitWithUsage(task, all);
  try {
    const { result } = await runCommand(task, { rawArgs: [...words] });
    process.exit(Number(result));
  } catch (error) {
    if (error instanceof UsageError) return exitWithUsage(task, all, error.message);
    console.error(error instanceof Failure ? `dev: ${error.message}` : error);
    process.exit(1);
  }
}

/** Citty passes over what a command does not have. @throws UsageError */
function refuseUnknown(args: ArgsDef, words: readonly string[]): void {
  const declared = Object.entries(args);
  const options = declared.filter(([, { type }]) => type !== "positional");
  try {
    parseArgs({
      args: [...words],
      options: Object.fromEntries(
        options.map(([name, { type }]) => [name, { type: type === "boolean" ? "boolean" : "string" }]),
      ),
      allowPositionals: declared.length > options.length,
    });
  } catch (error) {
    throw new UsageError(error instanceof Error ? error.message.split(/\. |\n/)[0] : String(error));
  }
}

/** Help is what was asked for unless a mistake is to be shown with it. */
async function exitWithUsage(command: CommandDef, parent?: CommandDef, mistake?: string): Promise<never> {
  const usage = await renderUsage(command, parent);
  const args = Object.values((command.args ?? {}) as ArgsDef);
  // Citty announces options where there are positionals only.
  const shown = args.some(({ type }) => type !== "positional") ? usage : usage.replace(" [OPTIONS]", "");
  if (mistake === undefined) {
    console.log(shown);
    process.exit(0);
  }
  console.error(`${shown}\n\ndev: ${mistake}`);
  process.exit(EXIT_USAGE);
}
