import { expect, test } from "bun:test";
import { join } from "node:path";
import { ROOT } from "../../../tools/command.ts";

/** What ./dev says; the shell script in front of it adds nothing. */
async function dev(...words: readonly string[]) {
  const child = Bun.spawn([process.execPath, join(ROOT, "tools/dev.ts"), ...words], {
    stdio: ["ignore", "pipe", "pipe"],
    env: { ...process.env, NO_COLOR: "1" },
    timeout: 20_000,
  });
  const [out, err, code] = await Promise.all([child.stdout.text(), child.stderr.text(), child.exited]);
  return { out, err, code };
}

const MISTAKES: readonly [words: string, reason: string, usage: string][] = [
  ["demo --bogus", "Unknown option '--bogus'", "./dev demo"],
  ["setup extra", "Unexpected argument 'extra'", "./dev setup"],
  ["test --bogus unit", "Unknown option '--bogus'", "./dev test [OPTIONS] [TIERS]"],
  ["test unit nosuch", `no test file of unit has "nosuch" in its name`, "./dev test [OPTIONS] [TIERS]"],
  ["bench nosuch", `no benchmark is called "nosuch"`, "./dev bench [OPTIONS] [NAMES]"],
  ["fuzz --minutes abc", `--minutes is "abc"`, "./dev fuzz [OPTIONS] [FILES]"],
  ["fuzz --seed", "argument missing", "./dev fuzz [OPTIONS] [FILES]"],
  ["nosuch", `there is no command "nosuch"`, "./dev setup|demo|"],
];
for (const [words, reason, usage] of MISTAKES) {
  test(`./dev ${words} is refused with the usage`, async () => {
    const { out, err, code } = await dev(...words.split(" "));
    expect(code).toBe(2);
    expect(out).toBe("");
    expect(err).toContain(`USAGE ${usage}`);
    expect(err).toContain(reason);
  });
}

test("help is no mistake", async () => {
  const { out, err, code } = await dev("test", "--help");
  expect({ err, code }).toEqual({ err: "", code: 0 });
  expect(out).toContain("USAGE ./dev test [OPTIONS] [TIERS]");
});
