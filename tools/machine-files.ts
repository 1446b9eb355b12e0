/**
 * Runs test files in the machine, one after the other, as it is told: `bun tools/machine-files.ts TIMEOUT`. Each line that it
 * writes is a FileMessage for tools/machine-tier.ts.
 */

import { readFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { INPUT_INSIDE } from "../test/kit/machine/description.ts";
import type { FileMessage } from "./machine-tier.ts";
import { runTestFile } from "./test-file.ts";

const timeout = Number(process.argv[2]);

for (let index = 0; ; index++) {
  say({ free: true });
  const file = await told(index);
  if (file === "") break;
  const scratch = join(tmpdir(), `m${index}`);
  say({ result: await runTestFile(file, { scratch, environment: {}, timeout, testTimeout: timeout }) });
}

/** Waits for a line. A machine whose host has gone is gone, too. */
async function told(index: number): Promise<string> {
  for (;;) {
    const lines = readFileSync(INPUT_INSIDE, "utf8").split("\n");
    // The last one is not complete.
    const line = lines[index];
    if (line !== undefined && index < lines.length - 1) return line;
    await Bun.sleep(20);
  }
}

function say(message: FileMessage): void {
  process.stdout.write(`${JSON.stringify(message)}\n`);
}
