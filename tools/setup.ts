import { defineCommand } from "citty";
import { exitWith } from "./command.ts";
import { prepare } from "./preparation.ts";

export default defineCommand({
  meta: {
    name: "setup",
    description: "Install and build what is missing: Debian packages, native/, the guest of demo and tests",
  },
  run: () =>
    exitWith(async () => {
      await prepare("native", "guest");
      console.log("setup: everything is in place");
      return 0;
    }),
});
