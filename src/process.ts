import { asError } from "./base/errors.ts";
import type { Logger } from "./base/log.ts";

/** What the programs that run until they are told to stop have in common. */

/** For what still holds the process after everything was stopped, milliseconds. */
const LEFTOVERS = 2000;

/** Resolves with the name of the first SIGTERM or SIGINT; a second one does not wait. */
export function stopSignal(): Promise<string> {
  const { promise, resolve } = Promise.withResolvers<string>();
  let asked = false;
  for (const signal of ["SIGTERM", "SIGINT"] as const) {
    process.on(signal, () => {
      if (asked) process.exit(1);
      asked = true;
      resolve(signal);
    });
  }
  return promise;
}

/** After a defect nothing is known about the state of this process any more, so it ends. */
export function dieOfUnhandled(log: Logger): void {
  for (const event of ["uncaughtException", "unhandledRejection"] as const) {
    process.on(event, (thrown: unknown) => {
      log.error(`unexpected error, please report it: ${asError(thrown).stack ?? String(thrown)}`);
      process.exit(1);
    });
  }
}

/** Ends the process even where something was forgotten that holds it. */
export function exitSoon(): void {
  setTimeout(() => process.exit(), LEFTOVERS).unref();
}
