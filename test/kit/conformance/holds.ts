import fc from "fast-check";
import { Deadline } from "../../../src/base/deadline.ts";
import { asError, VhostdError } from "../../../src/base/errors.ts";

/** Milliseconds that a call may keep the one thread that serves all functions. */
const BLOCKED_MAX = 2000;
/** Inputs that each property is tried with. */
const RUNS = 200;

export interface TrialOptions {
  readonly runs?: number;
  /** Whether an input that fails is made small, which takes many tries more. It is unless said. */
  readonly shrink?: boolean;
}

/**
 * Tries a property on random inputs.
 * @throws Error with what went wrong, an input that it goes wrong with, and the seed
 */
export async function holds<Input>(
  input: fc.Arbitrary<Input>,
  property: (value: Input) => Promise<void> | void,
  { runs = RUNS, shrink = true }: TrialOptions = {},
): Promise<void> {
  const result = await fc.check(
    fc.asyncProperty(input, async (value) => {
      await property(value);
    }),
    { numRuns: runs, endOnFailure: !shrink },
  );
  if (!result.failed) return;
  const { seed, counterexample, errorInstance } = result;
  throw new Error(`${asError(errorInstance).message} (with ${fc.stringify(counterexample)}, seed ${seed})`, {
    cause: errorInstance,
  });
}

/** @throws Error with `what` unless `truth` */
export function demand(truth: boolean, what: string): asserts truth {
  if (!truth) throw new Error(what);
}

/** Calls the class. @throws Error that says where, with the class's own text, or how long it took */
export function calling<T>(member: string, call: () => T): T {
  const start = performance.now();
  let result: T;
  try {
    result = call();
  } catch (cause) {
    throw new Error(`${member} throws: ${asError(cause).message}`, { cause });
  }
  demandReturn(member, start, BLOCKED_MAX);
  return result;
}

/** @throws Error where a call that began at `start` has kept the thread for longer than `limit` milliseconds */
function demandReturn(member: string, start: number, limit: number): void {
  const blocked = Math.round(performance.now() - start);
  demand(
    blocked <= limit,
    `${member} blocks for ${blocked} ms the one thread that serves all functions, limit ${limit} ms: await what takes time`,
  );
}

/** What the class threw where it may: an Error with a text, or none at all. @throws Error where it is another thing */
export function refusal(member: string, thrown: unknown): Error {
  demand(thrown instanceof Error, `${member} throws ${Bun.inspect(thrown)}, which is no Error`);
  demand(thrown.message !== "", `${member} throws an Error without a text`);
  return thrown;
}

/** How a call of the class ended. */
export type Outcome<T> = { readonly value: T } | { readonly thrown: unknown };

/** @throws VhostdError timedOut where the class comes to no end; Error where it blocks */
export async function outcome<T>(what: string, patience: number, call: () => Promise<T>): Promise<Outcome<T>> {
  const deadline = Deadline.after(patience, what);
  const start = performance.now();
  let working: Promise<T>;
  try {
    working = Promise.resolve(call());
  } catch (thrown) {
    return { thrown };
  }
  // It may fail as well, which nobody asks any more.
  working.catch(() => {});
  demandReturn(what, start, patience);
  try {
    return { value: await deadline.race(working) };
  } catch (thrown) {
    if (deadline.expired && thrown instanceof VhostdError && thrown.code === "timedOut") throw thrown;
    return { thrown };
  }
}
