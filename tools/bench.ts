import { existsSync } from "node:fs";
import { readdir } from "node:fs/promises";
import { join } from "node:path";
import { defineTask, ROOT, run, UsageError } from "./command.ts";
import { prepare } from "./preparation.ts";

const FOLDER = "test/bench";

export default defineTask({
  name: "bench",
  description: `Run the benchmarks in ${FOLDER}`,
  args: { names: { type: "positional", required: false, description: "Parts of file names; all unless given" } },
  run: async ({ _: parts }) => {
    const present = existsSync(join(ROOT, FOLDER)) ? await readdir(join(ROOT, FOLDER)) : [];
    const files = present.filter((file) => file.endsWith(".bench.ts")).sort();
    const unknown = parts.find((part) => !files.some((file) => file.includes(part)));
    if (unknown !== undefined)
      throw new UsageError(`no benchmark is called "${unknown}"; there are: ${files.join(", ")}`);
    await prepare("native");
    let failed = 0;
    for (const file of files.filter((each) => parts.length === 0 || parts.some((part) => each.includes(part)))) {
      console.log(`\n${file}`);
      if ((await run([process.execPath, join(FOLDER, file)])) !== 0) failed = 1;
    }
    return failed;
  },
});
