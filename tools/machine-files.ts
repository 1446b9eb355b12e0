/**
 * Runs test files in the machine, one after the other: `bun tools/machine-files.ts TIMEOUT FILE…`. Each line that it writes
 * is a FileMessage for tools/machine-tier.ts.
 */

import { tmpdir } from "node:os";
import { join } from "node:path";
import type { FileMessage } from "./machine-tier.ts";
import { runTestFile } from "./test-file.ts";

const [timeout, ...files] = process.argv.slice(2);

for (const [index, file] of files.entries()) {
  say({ started: file });
  const scratch = join(tmpdir(), `m${index}`);
  say({
    result: await runTestFile(file, {
      scratch,
      environment: {},
      timeout: Number(timeout),
      testTimeout: Number(timeout),
    }),
  });
}

function say(message: FileMessage): void {
  process.stdout.write(`${JSON.stringify(message)}\n`);
}
