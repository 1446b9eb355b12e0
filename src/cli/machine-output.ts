import { formatStep, type Step } from "../machine/steps.ts";

/** What the commands that change this machine print. */

/** One line, whatever is in it: names of processes and files are the choice of others, and so are escape sequences in them. */
export function printLine(text: string): void {
  process.stdout.write(`${printable(text)}\n`);
}

/** Ready to be typed. */
export function printSteps(steps: readonly Step[]): void {
  for (const step of steps) printLine(formatStep(step));
}

export function printWarning(text: string): void {
  process.stderr.write(`vfe-vhost-cli: warning: ${printable(text)}\n`);
}

/** Control characters as JSON writes them. */
function printable(text: string): string {
  return text.replaceAll(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu, (character) => {
    return `\\u${(character.codePointAt(0) ?? 0).toString(16).padStart(4, "0")}`;
  });
}
