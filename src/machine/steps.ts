import { SystemError, VhostdError } from "../base/errors.ts";
import type { Machine } from "./machine.ts";

const EACCES = 13;

/** One change of the machine. `check` reads back whether it has come about; undefined where it has. */
export type Step = {
  readonly check?: (machine: Machine) => Promise<string | undefined>;
} & ({ readonly path: string; readonly value: string } | { readonly command: readonly string[] });

/** As a person would type it at a shell. */
export function formatStep(step: Step): string {
  return "command" in step ? step.command.join(" ") : `echo ${step.value} > ${step.path}`;
}

/**
 * Takes the steps in their order; each is read back before the next one.
 * @throws SystemError; VhostdError accessDenied where this user may not; io: what was written, and what the machine says
 */
export async function takeSteps(machine: Machine, steps: readonly Step[]): Promise<void> {
  for (const step of steps) {
    await take(machine, step);
    const wrong = await step.check?.(machine);
    if (wrong !== undefined) throw new VhostdError("io", `\`${formatStep(step)}\` had no effect: ${wrong}`);
  }
}

async function take(machine: Machine, step: Step): Promise<void> {
  const typed = `\`${formatStep(step)}\``;
  try {
    if ("command" in step) await machine.run(step.command);
    else await machine.write(step.path, `${step.value}\n`);
  } catch (cause) {
    const denied =
      cause instanceof SystemError ? cause.errno === EACCES : "command" in step && process.geteuid?.() !== 0;
    if (denied) throw new VhostdError("accessDenied", `this user may not ${typed}`, { fix: "run this as root", cause });
    throw cause instanceof SystemError ? new SystemError(typed, cause.errno, { cause }) : cause;
  }
}

/** A step failed because of who took it. */
export function isDenied(error: unknown): error is VhostdError & { readonly fix: string } {
  return error instanceof VhostdError && error.code === "accessDenied" && error.fix !== undefined;
}
