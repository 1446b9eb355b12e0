import { expect, test } from "bun:test";
import { Failure } from "../../../tools/command.ts";
import { startMachine } from "../../../tools/machine.ts";
import { type FileMessage, lineReader, runBatch, runMachineTier, withFreshLists } from "../../../tools/machine-tier.ts";
import { updatePackageLists } from "../../../tools/packages.ts";
import { missingMachines } from "../../../tools/setup.ts";
import type { FileResult } from "../../../tools/test-file.ts";
import { rejection } from "../../kit/rejection.ts";

const FILES = ["test/vfio/a.test.ts", "test/vfio/b.test.ts", "test/vfio/c.test.ts"] as const;

function passed(file: string): FileResult {
  return { file, seconds: 1, output: "", cases: [{ name: "x", outcome: "passed" }], problems: [] };
}

/** Runs FILES in a machine that writes this and then ends with that code, or dies. */
async function inMachine(messages: readonly FileMessage[], end: number | Error) {
  const results: FileResult[] = [];
  const rest = await runBatch(
    { profile: "newest", files: FILES },
    1000,
    (result) => results.push(result),
    async () => ({
      finished: async (_timeout: number, onOutput: (text: string) => void) => {
        for (const message of messages) onOutput(`${JSON.stringify(message)}\n`);
        if (typeof end !== "number") throw end;
        return end;
      },
      [Symbol.asyncDispose]: async () => {},
    }),
  );
  return { results, rest };
}

test("results carry the name of the machine", async () => {
  const { results, rest } = await inMachine(
    FILES.flatMap((file) => [{ started: file }, { result: passed(file) }]),
    0,
  );
  expect(results.map(({ file }) => file)).toEqual(FILES.map((file) => `${file} (newest)`));
  expect(rest).toEqual([]);
});

test("a machine that dies is the failure of the file that ran, and the rest is run again", async () => {
  const messages = [{ started: FILES[0] }, { result: passed(FILES[0]) }, { started: FILES[1] }];
  const { results, rest } = await inMachine(messages, new Error("panic"));
  expect(results.map(({ problems }) => problems.length)).toEqual([0, 1]);
  expect(results[1]!.file).toStartWith(FILES[1]);
  expect(results[1]!.output).toContain("panic");
  expect(rest).toEqual([FILES[2]]);
});

test("a machine that never comes up is the failure of its first file", async () => {
  const { results, rest } = await inMachine([], new Error("no boot"));
  expect(results.map(({ file, problems }) => [file, problems.length])).toEqual([[`${FILES[0]} (newest)`, 1]]);
  expect(rest).toEqual([FILES[1], FILES[2]]);
});

test("files that were not run are not forgotten, whatever the exit code is", async () => {
  const { results, rest } = await inMachine([{ started: FILES[0] }, { result: passed(FILES[0]) }], 0);
  expect(results.map(({ problems }) => problems.length)).toEqual([0, 1]);
  expect(rest).toEqual([FILES[2]]);
});

test("messages come in pieces, and what is none is kept", () => {
  const messages: FileMessage[] = [];
  const noise: string[] = [];
  const read = lineReader((message) => messages.push(message), noise);
  for (const piece of ['{"star', 'ted":"a"}\nwarning\n{"started"', ':"b"}\n']) read(piece);
  expect(messages).toEqual([{ started: "a" }, { started: "b" }]);
  expect(noise).toEqual(["warning"]);
});

async function no(what: string): Promise<never> {
  throw new Error(`no ${what} [at all]\nand more`);
}

/** Names of what is skipped, where the guest or the machines cannot be had. */
async function skippedWithout(guest: () => Promise<void>): Promise<string[]> {
  const shown: FileResult[] = [];
  const options = { timeout: 1000, iommufd: false, show: (result: FileResult) => shown.push(result) };
  const results = await runMachineTier(FILES, options, { guest, machine: () => no("QEMU") });
  expect(results).toEqual(shown);
  expect(results.map(({ file }) => file.split(" ")[0]!)).toEqual(expect.arrayContaining([...FILES]));
  const cases = results.flatMap((result) => result.cases);
  expect(cases.filter(({ outcome }) => outcome !== "skipped")).toEqual([]);
  return [...new Set(cases.map(({ name }) => name))];
}

test("without the guest, or without the machine, all files are skipped, each with the reason in one line", async () => {
  expect(await skippedWithout(() => no("packages"))).toEqual(["all tests [skip: no packages [at all)]"]);
  expect(await skippedWithout(async () => {})).toEqual([
    "all tests [skip: the VM with an IOMMU cannot be made: no QEMU [at all)]",
  ]);
});

test("what could not be had is said, not that the lists could not be refreshed", async () => {
  let times = 0;
  const bring = async () => {
    if (++times === 1) await no("QEMU");
  };
  expect((await rejection(withFreshLists(bring, () => no("apt-get")))).message).toStartWith("no QEMU");
  times = 0;
  await withFreshLists(bring, async () => {});
  expect(times).toBe(2);
});

test("a missing program is not asked for again", async () => {
  const path = process.env["PATH"];
  process.env["PATH"] = "/nonexistent";
  try {
    const error = await rejection(updatePackageLists());
    expect(error).toBeInstanceOf(Failure);
    expect(error.message).toContain("this machine has no apt-get");
  } finally {
    process.env["PATH"] = path;
  }
});

test("machines that cannot be had are a failure of ./dev machine, and named by ./dev setup", async () => {
  const options = { kernel: "6.1", sriov: false, addressBits: 48 } as const;
  const error = await rejection(startMachine(options, { words: ["true"], directory: "/" }, () => no("kernel")));
  expect(error).toBeInstanceOf(Failure);
  expect(error.message).toStartWith("no VM with an IOMMU: no kernel");
  expect(await missingMachines(async () => {})).toEqual([]);
  expect(await missingMachines((profile) => (profile === "newest" ? no("QEMU") : Promise.resolve()))).toEqual([
    expect.stringMatching(/^newest: no QEMU/),
  ]);
});
