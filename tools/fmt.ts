import { defineTask, run } from "./command.ts";

export default defineTask({
  name: "fmt",
  description: "Format the sources and apply the linter's safe fixes",
  run: () => run(["biome", "check", "--write", "."]),
});
