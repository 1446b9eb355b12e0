import { defineCommand } from "citty";
import { exitWith, run } from "./command.ts";

export default defineCommand({
  meta: { name: "fmt", description: "Format the sources and apply the linter's safe fixes" },
  run: () => exitWith(() => run(["biome", "check", "--write", "."])),
});
