import { expect, test } from "bun:test";
import { closeSync, mkdtempSync, openSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { LogOutput } from "../../../src/base/log-output.ts";

const LINE = `${"x".repeat(1023)}\n`;

test("a reader that stops costs lines and no memory, and is told how many when it goes on", () => {
  const kept: { text: string; done: () => void }[] = [];
  const output = new LogOutput({ write: (text, done) => kept.push({ text, done }) }, (lines) => `${lines} missing`);
  for (let line = 0; line < 3000; line++) output.write(LINE);
  expect(kept).toHaveLength(1024);
  for (const { done } of kept.splice(0)) done();
  expect(kept.map(({ text }) => text)).toEqual(["1976 missing"]);
  output.write("next");
  expect(kept.at(-1)?.text).toBe("next");
});

/** A program that logs `lines` lines of 1000 characters once its standard input has ended, and exits with 7. */
function program(lines: number): string {
  return `
    import { createLogger } from "${import.meta.dir}/../../../src/base/log.ts";
    import { dieOfUnhandled } from "${import.meta.dir}/../../../src/process.ts";
    const log = createLogger("info", false);
    dieOfUnhandled(log);
    await Bun.stdin.text();
    process.stdout.write("ready\\n");
    for (let i = 0; i < ${lines}; i++) {
      log.info("x".repeat(1000));
      if (i % 100 === 0) await Bun.sleep(0);
    }
    await Bun.sleep(20);
    process.exit(7);`;
}

test("a process outlives the readers of its standard streams", async () => {
  const child = Bun.spawn([process.execPath, "-e", program(10)], { stdin: "pipe", stdout: "pipe", stderr: "pipe" });
  await Promise.all([child.stdout.cancel(), child.stderr.cancel()]);
  await child.stdin.end();
  expect(await child.exited).toBe(7);
});

test("a process is not blocked by a reader that does not read", async () => {
  const directory = mkdtempSync(join(tmpdir(), "log-"));
  try {
    const path = join(directory, "fifo");
    Bun.spawnSync(["mkfifo", path]);
    const fifo = openSync(path, "r+");
    const command = [process.execPath, "-e", program(2000)];
    const child = Bun.spawn(command, { stdin: "pipe", stdout: "ignore", stderr: fifo });
    await child.stdin.end();
    expect(await child.exited).toBe(7);
    closeSync(fifo);
  } finally {
    rmSync(directory, { recursive: true });
  }
});
