import { closeSync, openSync } from "node:fs";
import { mkdir, readdir, rm } from "node:fs/promises";
import { join } from "node:path";
import { ROOT } from "./command.ts";
import { parseReport, type TestCase } from "./junit.ts";
import { endLeftoverProcesses, RUN_MARK } from "./leftovers.ts";

/** What a test file came to. `problems` are failures that no test case stands for. */
export interface FileResult {
  readonly file: string;
  readonly seconds: number;
  readonly output: string;
  readonly cases: readonly TestCase[];
  readonly problems: readonly string[];
}

export interface TestFileOptions {
  /** An empty folder for this file; short, because sockets are made in it. */
  readonly scratch: string;
  readonly environment: Readonly<Record<string, string>>;
  /** Milliseconds after which the process is ended. */
  readonly timeout: number;
  /** Milliseconds that each test has, where it does not say so itself; Bun's default unless given. */
  readonly testTimeout?: number;
}

/**
 * Runs one file with `bun test`, in a process and a temporary directory of its own.
 *
 * An exit code of 0 proves little (a test can end the process, a file can have no tests), so the verdict comes from the
 * report, and a report that is missing or empty is a problem.
 */
export async function runTestFile(file: string, options: TestFileOptions): Promise<FileResult> {
  const { scratch, environment, timeout } = options;
  const mark = crypto.randomUUID();
  const temporary = join(scratch, "t");
  const report = join(scratch, "junit.xml");
  await mkdir(temporary, { recursive: true });
  const started = performance.now();
  // A file, not a pipe: a process that the tests leave behind would keep a pipe open.
  const log = join(scratch, "output");
  const output = openSync(log, "a");
  const flags = ["--reporter=junit", `--reporter-outfile=${report}`];
  if (options.testTimeout !== undefined) flags.push(`--timeout=${options.testTimeout}`);
  const child = Bun.spawn([process.execPath, "test", ...flags, `./${file}`], {
    cwd: ROOT,
    // CI makes bun refuse test.only, which would silently leave out the rest of the file.
    env: { ...process.env, ...environment, CI: "1", TMPDIR: temporary, [RUN_MARK]: mark },
    stdio: ["ignore", output, output],
    timeout,
    killSignal: "SIGKILL",
  });
  closeSync(output);
  await child.exited;
  const seconds = (performance.now() - started) / 1000;
  const cases = (await Bun.file(report).exists()) ? parseReport(await Bun.file(report).text()) : [];
  const problems = [
    ...runnerProblems(child, cases, timeout),
    ...unexplainedSkips(cases),
    ...(await endLeftoverProcesses(mark)),
    ...(await readdir(temporary)).map((name) => `left behind in its temporary directory: ${name}`),
  ];
  const result = { file, seconds, output: await Bun.file(log).text(), cases, problems };
  await rm(scratch, { recursive: true, force: true });
  return result;
}

function runnerProblems(child: Bun.Subprocess, cases: readonly TestCase[], timeout: number): string[] {
  if (child.signalCode === "SIGKILL") return [`did not end within ${timeout / 1000} s, or was killed`];
  if (child.signalCode) return [`the test process died of ${child.signalCode}`];
  if (cases.length === 0) return ["no test reported a result: the file has none, or ended the process"];
  const failed = cases.some((test) => test.outcome === "failed");
  if (child.exitCode !== 0 && !failed) return [`bun test ended with ${child.exitCode}, but no test failed`];
  return [];
}

/** A skipped test says why in its name: "… [skip: no KVM on this machine]". */
function unexplainedSkips(cases: readonly TestCase[]): string[] {
  const skipped = cases.filter((test) => test.outcome === "skipped" && !skipReason(test.name));
  return skipped.map((test) => `skipped without a reason: ${test.name}`);
}

/** What the person has to know: failures, problems, and skips, whose reason is in their name; a line each. */
export function notesOf({ file, cases, problems }: FileResult): string[] {
  const tests = cases.filter(({ outcome }) => outcome !== "passed");
  return [
    ...tests.map(({ outcome, name }) => `${outcome}: ${file}: ${name}`),
    ...problems.map((problem) => `failed: ${file}: ${problem}`),
  ];
}

/** The reason in the name of a skipped test. */
function skipReason(name: string): string | undefined {
  return /\[skip: ([^\]]+)\]/.exec(name)?.[1];
}
