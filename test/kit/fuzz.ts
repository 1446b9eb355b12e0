import fc from "fast-check";

/** How long a property is tried in an ordinary test run; `./dev fuzz` takes minutes. Milliseconds. */
const SHORT = 2_000;
const milliseconds = Number(process.env["VHOSTD_FUZZ_MS"] ?? SHORT);
const BATCH = 100;

/** For the test around it: the time of the runs, and some for making a failure small. */
export const FUZZ_TIMEOUT = milliseconds * 2 + 30_000;

/**
 * Tries a property in batches until the time is up; each batch ends before the next begins.
 * @throws Error with the smallest input found that fails, and the seed that `./dev fuzz --seed` repeats it by
 */
export async function fuzz<Input>(property: fc.IAsyncProperty<Input>): Promise<void> {
  const end = performance.now() + milliseconds;
  const first = Number(process.env["VHOSTD_FUZZ_SEED"] ?? Math.floor(Math.random() * 2 ** 31));
  for (let batch = 0; batch === 0 || performance.now() < end; batch++) {
    await fc.assert(property, { numRuns: BATCH, seed: first + batch });
  }
}
