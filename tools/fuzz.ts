import { defineCommand } from "citty";
import { exitWith } from "./command.ts";
import { runTests } from "./test.ts";

/** A file takes as long as its properties were told to; a day is for ever. */
const NO_TIMEOUT = 86_400_000;

export default defineCommand({
  meta: { name: "fuzz", description: "Run the fuzz tests for long; prints the seed, and repeats a run by it" },
  args: {
    minutes: { type: "string", default: "5", description: "How long each property is tried" },
    seed: { type: "string", description: "Seed of an earlier run" },
    files: { type: "positional", required: false, description: "Parts of file names; all unless given" },
  },
  run: ({ args }) =>
    exitWith(() => {
      const seed = args.seed ?? `${Math.floor(Math.random() * 2 ** 31)}`;
      console.log(`seed ${seed}`);
      const milliseconds = Math.round(Number(args.minutes) * 60_000);
      const environment = { VHOSTD_FUZZ_MS: `${milliseconds}`, VHOSTD_FUZZ_SEED: seed };
      return runTests(["fuzz", ...args._], environment, NO_TIMEOUT);
    }),
});
