import { existsSync } from "node:fs";
import { readdir } from "node:fs/promises";
import { join } from "node:path";
import { defineCommand } from "citty";
import { exitWith, Failure, ROOT, run } from "./command.ts";
import { prepare } from "./preparation.ts";

const FOLDER = "test/bench";

export default defineCommand({
  meta: { name: "bench", description: `Run the benchmarks in ${FOLDER}` },
  args: { names: { type: "positional", required: false, description: "Parts of file names; all unless given" } },
  run: ({ args }) =>
    exitWith(async () => {
      await prepare("native");
      const present = existsSync(join(ROOT, FOLDER)) ? await readdir(join(ROOT, FOLDER)) : [];
      const files = present.filter((file) => file.endsWith(".bench.ts")).sort();
      const chosen = files.filter((file) => args._.length === 0 || args._.some((part) => file.includes(part)));
      if (chosen.length === 0)
        throw new Failure(`no benchmark of ${FOLDER} is called so; there are: ${files.join(", ")}`);
      let failed = 0;
      for (const file of chosen) {
        console.log(`\n${file}`);
        if ((await run([process.execPath, join(FOLDER, file)])) !== 0) failed = 1;
      }
      return failed;
    }),
});
