import { expect, test } from "bun:test";
import { join } from "node:path";

test("a class that blocks for ever ends the tests with its name", async () => {
  const watchdog = join(import.meta.dir, "../kit/conformance/watchdog.ts");
  const source = `const { Watchdog } = await import("${watchdog}");
    const watchdog = await Watchdog.start();
    watchdog.watch("a check that ends", 100);
    watchdog.rest();
    await Bun.sleep(200);
    watchdog.watch("device class x", 100);
    for (;;);`;
  const child = Bun.spawn([process.execPath, "-e", source], { stderr: "pipe" });
  expect(await child.stderr.text()).toBe(
    "device class x: the thread is blocked for 100 ms or more, the tests end here\n",
  );
  expect(await child.exited).toBe(137);
});
