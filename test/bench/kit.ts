/** A bound that a figure is to keep, in the figure's unit. */
export interface Target {
  readonly at: "most" | "least";
  readonly value: number;
}

/** What was measured: the median of several runs, with the lowest and the highest of them. */
export interface Figure {
  /** `group.what_unit`, unique over all groups: `start.daemon_ms`. */
  readonly key: string;
  readonly value: number;
  readonly min: number;
  readonly max: number;
  /** "ms", "MiB", "ratio". */
  readonly unit: string;
  readonly target?: Target;
  /** Of a ratio: what its divisor was measured with. */
  readonly peer?: string;
}

/** What a file of test/bench exports by default. It runs in a process of its own. */
export interface Benchmark {
  /** As the file is called, without `.bench.ts`. */
  readonly name: string;
  /** May write progress to standard error; what it started has ended when it resolves. */
  run(): Promise<Figure[]>;
}

const FEWEST_RUNS = 5;

/**
 * One figure out of its runs.
 * @param samples one value a run, in `unit`
 * @throws RangeError with fewer than five samples: a median of those says nothing
 */
export function figure(key: string, samples: readonly number[], unit: string, target?: Target): Figure {
  if (samples.length < FEWEST_RUNS) {
    throw new RangeError(`${key} has ${samples.length} runs, expected ${FEWEST_RUNS} at least`);
  }
  const sorted = samples.toSorted((a, b) => a - b);
  const middle = sorted.length / 2;
  const value = (sorted[Math.ceil(middle) - 1]! + sorted[Math.floor(middle)]!) / 2;
  const all = { key, value, min: sorted[0]!, max: sorted.at(-1)!, unit };
  return target === undefined ? all : { ...all, target };
}

/** Whether a figure keeps its target; undefined where it has none. */
export function isMet({ value, target }: Figure): boolean | undefined {
  if (target === undefined) return undefined;
  return target.at === "most" ? value <= target.value : value >= target.value;
}
