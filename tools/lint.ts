import { defineCommand } from "citty";
import { exitWith, run } from "./command.ts";

const CHECKS = [["biome", "check", "."], ["tsc", "-p", "."], ["knip"]] as const;

export default defineCommand({
  meta: { name: "lint", description: "Format and lint rules (biome), types (tsc), unused code (knip)" },
  run: () =>
    exitWith(async () => {
      let failed = 0;
      for (const check of CHECKS) if ((await run(check)) !== 0) failed = 1;
      return failed;
    }),
});
