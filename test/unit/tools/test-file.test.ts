import { expect, test } from "bun:test";
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join, relative } from "node:path";
import { ROOT } from "../../../tools/command.ts";
import { type FileResult, notesOf, runTestFile } from "../../../tools/test-file.ts";

const IMPORT = `import { test } from "bun:test"; import { mkdtempSync } from "node:fs"; import { tmpdir } from "node:os";\n`;

/** What the runner makes of a test file with this text. */
async function resultOf(text: string, timeout = 20_000): Promise<FileResult> {
  const folder = await mkdtemp(join(tmpdir(), "r-"));
  try {
    const file = join(folder, "sample.test.ts");
    await writeFile(file, IMPORT + text);
    const scratch = join(folder, "s");
    return await runTestFile(relative(ROOT, file), { scratch, environment: {}, timeout });
  } finally {
    await rm(folder, { recursive: true, force: true });
  }
}

test("outcomes are taken from the report", async () => {
  const { cases, problems } = await resultOf(`
    test("good", () => {}); test("bad & <ugly>", () => { throw new Error("x"); }); test.skip("later [skip: no hardware]", () => {});`);
  expect(problems).toEqual([]);
  expect(cases).toEqual([
    { name: "good", outcome: "passed" },
    { name: "bad & <ugly>", outcome: "failed" },
    { name: "later [skip: no hardware]", outcome: "skipped" },
  ]);
});

const PROBLEMS: readonly [what: string, text: string, problem: RegExp, timeout?: number][] = [
  ["a file without tests", "", /no test reported a result/],
  ["a test that ends the process with 0", `test("x", () => process.exit(0));`, /no test reported a result/],
  ["a crash", `test("x", () => process.kill(process.pid, "SIGSEGV"));`, /died of SIGSEGV/],
  ["a file that hangs", `test("x", () => { for (;;); });`, /did not end/, 1000],
  ["test.only", `test.only("x", () => {}); test("y", () => { throw 1; });`, /no test reported a result/],
  ["a skip without a reason", `test("x", () => {}); test.skip("y", () => {});`, /skipped without a reason: y/],
  ["a file left behind", `test("x", () => { mkdtempSync(tmpdir() + "/left-"); });`, /left behind .*left-/],
  ["a process left behind", `test("x", () => Bun.spawn(["sleep", "60"]).unref());`, /still runs: sleep 60/],
];
for (const [what, text, problem, timeout] of PROBLEMS) {
  test(`${what} is a failure`, async () => {
    const { problems } = await resultOf(text, timeout);
    expect(problems).toHaveLength(1);
    expect(problems[0]).toMatch(problem);
  });
}

test("what is not as it should be is noted in a line each, with its reason once", () => {
  const cases = [
    { name: "a", outcome: "passed" },
    { name: "b [skip: no apt-get]", outcome: "skipped" },
    { name: "c", outcome: "failed" },
  ] as const;
  expect(notesOf({ file: "f.ts", seconds: 1, output: "", cases, problems: ["did not end"] })).toEqual([
    "skipped: f.ts: b [skip: no apt-get]",
    "failed: f.ts: c",
    "failed: f.ts: did not end",
  ]);
});
