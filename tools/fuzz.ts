import { readdir } from "node:fs/promises";
import { join } from "node:path";
import { defineTask, ROOT, UsageError } from "./command.ts";
import { runTests } from "./test.ts";

/** A file takes as long as its properties were told to; a day is for ever. */
const NO_TIMEOUT = 86_400_000;
/** Inputs that failed; tried first in every later run. */
const CORPUS = "test/fuzz/corpus";

export default defineTask({
  name: "fuzz",
  description: "Run the fuzz tests for long; prints the seed, and repeats a run by it",
  args: {
    minutes: { type: "string", default: "5", description: "How long each property is tried" },
    seed: { type: "string", description: "Seed of an earlier run" },
    files: { type: "positional", required: false, description: "Parts of file names; all unless given" },
  },
  run: async ({ minutes, seed = `${Math.floor(Math.random() * 2 ** 31)}`, _: parts }) => {
    if (!/^\d+(\.\d+)?$/.test(minutes) || Number(minutes) === 0) {
      throw new UsageError(`--minutes is "${minutes}", must be a number above 0`);
    }
    if (!/^-?\d+$/.test(seed)) throw new UsageError(`--seed is "${seed}", must be the whole number that a run printed`);
    console.log(`seed ${seed}`);
    const milliseconds = Math.round(Number(minutes) * 60_000);
    const environment = { VHOSTD_FUZZ_MS: `${milliseconds}`, VHOSTD_FUZZ_SEED: seed };
    const before = await kept();
    const code = await runTests({ tiers: ["fuzz"], filters: parts }, environment, NO_TIMEOUT);
    const found = (await kept()).filter((name) => !before.includes(name));
    for (const name of found) console.log(`kept, to be committed with its repair: ${join(CORPUS, name)}`);
    if (code !== 0) console.log(`again: ./dev fuzz --seed ${seed}`);
    return code;
  },
});

async function kept(): Promise<string[]> {
  const names = await readdir(join(ROOT, CORPUS));
  return names.filter((name) => name.endsWith(".json"));
}
