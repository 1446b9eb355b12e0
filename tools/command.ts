import { join } from "node:path";

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

/** Runs a command that is shown only when it fails. @throws Failure with what it wrote */
export async function runQuietly(command: readonly string[], environment: Record<string, string> = {}): Promise<void> {
  const child = Bun.spawn([...command], {
    cwd: ROOT,
    env: { ...process.env, ...environment },
    stdio: ["ignore", "pipe", "pipe"],
  });
  const [text, errors, code] = await Promise.all([child.stdout.text(), child.stderr.text(), child.exited]);
  if (code !== 0) throw new Failure(`${command.join(" ")} ended with ${code}\n${text}${errors}`);
}

/** Ends the program with the code that `action` answers, or with 1 and the reason when it throws a Failure. */
export async function exitWith(action: () => Promise<number>): Promise<never> {
  try {
    process.exit(await action());
  } catch (error) {
    console.error(error instanceof Failure ? `dev: ${error.message}` : error);
    process.exit(1);
  }
}
