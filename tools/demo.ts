import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { defineTask } from "./command.ts";
import { prepare } from "./preparation.ts";

export default defineTask({
  name: "demo",
  description:
    "A Linux guest uses its disk and talks to another guest through software VFs, step by step; three minutes at most",
  run: async () => {
    await prepare("native", "guest");
    const { runDemo } = await import("./demo-steps.ts");
    const home = await mkdtemp(join(tmpdir(), "vhostd-demo-"));
    const stop = Promise.withResolvers<number>();
    for (const signal of ["SIGINT", "SIGTERM"] as const) {
      process.once(signal, () => stop.resolve(signal === "SIGINT" ? 130 : 143));
    }
    const resources = new AsyncDisposableStack();
    const steps = runDemo(home, resources);
    try {
      return await Promise.race([steps, stop.promise]);
    } finally {
      await resources.disposeAsync();
      // Whatever it was waiting for when it was interrupted has ended now.
      await steps.catch(() => {});
      await rm(home, { recursive: true, force: true });
    }
  },
});
