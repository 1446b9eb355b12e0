import { ROOT } from "./command.ts";
import type { TestCase } from "./junit.ts";
import type { FileResult } from "./test-file.ts";

/** What the driver of native/test says at its end. */
const SUMMARY = /^native: (\d+) tests, \d+ checks passed, (\d+) failed$/gm;
/** Runs in native/Makefile, sanitize-test. */
const SANITIZERS = ["address and undefined behaviour", "thread"];

/** Runs the test driver of native/ under each sanitizer. */
export async function runNativeTests(): Promise<FileResult[]> {
  const started = performance.now();
  const child = Bun.spawn(["make", "-C", "native", `-j${navigator.hardwareConcurrency}`, "sanitize-test"], {
    cwd: ROOT,
    stdio: ["ignore", "pipe", "pipe"],
  });
  const [text, errors, code] = await Promise.all([child.stdout.text(), child.stderr.text(), child.exited]);
  const summaries = [...text.matchAll(SUMMARY)];
  const problems = code === 0 ? [] : [`make sanitize-test ended with ${code}`];
  if (code === 0 && summaries.length !== SANITIZERS.length)
    problems.push(`${summaries.length} sanitizer runs reported`);
  const cases = summaries.flatMap(([, tests, failed], run) =>
    casesOf(SANITIZERS[run] ?? "", Number(tests), Number(failed)),
  );
  return [{ file: "native/", seconds: (performance.now() - started) / 1000, output: text + errors, cases, problems }];
}

/** The driver names failed checks in its output and counts the rest only. */
function casesOf(sanitizer: string, tests: number, failed: number): TestCase[] {
  return Array.from({ length: tests }, (_, index) => ({
    name: `${sanitizer} sanitizer, test ${index + 1}`,
    outcome: index < failed ? "failed" : "passed",
  }));
}
