import { defineTask, run } from "./command.ts";

const CHECKS = [["biome", "check", "."], ["tsc", "-p", "."], ["knip"]] as const;

export default defineTask({
  name: "lint",
  description: "Format and lint rules (biome), types (tsc), unused code (knip)",
  run: async () => {
    let failed = 0;
    for (const check of CHECKS) if ((await run(check)) !== 0) failed = 1;
    return failed;
  },
});
