import { existsSync } from "node:fs";
import fc from "fast-check";
import { addToCorpus, CORPUS_DIRECTORY, readCorpus } from "./fuzz/corpus.ts";

/** How long a property is tried in an ordinary test run; `./dev fuzz` takes minutes. Milliseconds. */
const SHORT = 1_500;
const told = process.env["VHOSTD_FUZZ_MS"];
const milliseconds = Number(told ?? SHORT);
const BATCH = 100;
/** Milliseconds for a batch with a failure in it to be made small; what is found by then counts. */
const SHRINK_TIME = 15_000;

/** How long `./dev fuzz` wants each property to be tried, milliseconds; undefined in an ordinary test run. */
export const LONG_RUN = told === undefined ? undefined : milliseconds;

/** Of this run; `./dev fuzz --seed` repeats it. */
export const SEED = Number(process.env["VHOSTD_FUZZ_SEED"] ?? Math.floor(Math.random() * 2 ** 31));

/** For the test around it: the time of the runs, and some for making a failure small. */
export const FUZZ_TIMEOUT = milliseconds * 2 + 60_000;

export interface FuzzOptions {
  /** Inputs tried between two looks at the clock; fewer where each takes long. */
  readonly batch?: number;
  /** Where failures are kept. */
  readonly corpus?: string;
  /** After each batch; it throws where something is wrong that no single input shows. */
  between?(): Promise<void>;
  /** Asked after each batch in the place of the clock. */
  enough?(): boolean;
}

/**
 * Tries a property: first on the inputs that it once failed on, then on random ones in batches until the time is up.
 * An input that fails is made small and kept in the corpus.
 * @param name of the property in the corpus; changes with the form of its inputs
 * @throws Error with the input, where it is kept, and the seed that finds it at once
 */
export async function fuzz<Input>(
  name: string,
  property: fc.IAsyncProperty<Input>,
  { batch = BATCH, corpus = CORPUS_DIRECTORY, between = async () => {}, enough = clock() }: FuzzOptions = {},
): Promise<void> {
  const examples = existsSync(corpus) ? (readCorpus(name, corpus) as Input[]) : [];
  if (examples.length > 0) report(await fc.check(property, { examples, numRuns: examples.length }), name, corpus);
  const limits = { interruptAfterTimeLimit: milliseconds + SHRINK_TIME, markInterruptAsFailure: true };
  for (let number = 0; number === 0 || !enough(); number++) {
    const seed = SEED + number;
    report(await fc.check(property, { numRuns: batch, seed, ...limits }), name, corpus);
    await between().catch((cause: unknown) => {
      throw new Error(`after a batch with the seed ${seed}: ${cause}`, { cause });
    });
  }
}

function clock(): () => boolean {
  const end = performance.now() + milliseconds;
  return () => performance.now() >= end;
}

function report<Input>(details: fc.RunDetails<Input>, property: string, corpus: string): void {
  if (!details.failed) return;
  const text = fc.defaultReportMessage(details);
  const { seed, counterexample: input, errorInstance } = details;
  if (input === null) throw new Error(text);
  const error = String(errorInstance);
  throw new Error(`kept as ${addToCorpus({ property, seed, error, input }, corpus)}\n${text}`, {
    cause: errorInstance,
  });
}
