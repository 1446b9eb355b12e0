import { defineTask } from "./command.ts";
import { prepare } from "./preparation.ts";

export default defineTask({
  name: "setup",
  description: "Install and build what is missing: Debian packages, native/, the guest of demo and tests",
  run: async () => {
    await prepare("native", "guest");
    console.log("setup: everything is in place");
    return 0;
  },
});
