import { expect, test } from "bun:test";
import { Failure } from "../../../tools/command.ts";
import { startMachine } from "../../../tools/machine.ts";
import {
  type FileMessage,
  lineReader,
  runMachine,
  runMachineTier,
  withFreshLists,
} from "../../../tools/machine-tier.ts";
import { updatePackageLists } from "../../../tools/packages.ts";
import { missingMachines } from "../../../tools/setup.ts";
import type { FileResult } from "../../../tools/test-file.ts";
import { rejection } from "../../kit/rejection.ts";

const FILES = ["test/vfio/a.test.ts", "test/vfio/b.test.ts", "test/vfio/c.test.ts"] as const;

function passed(file: string): FileResult {
  return { file, seconds: 1, output: "", cases: [{ name: "x", outcome: "passed" }], problems: [] };
}

/** What a machine does with a file that it was given: a result of it, or an end of the machine. */
type Behaviour = (file: string) => FileResult | Error;

/** Runs FILES in one machine. @param end its exit code, or its death, once it was told that there are no more */
async function inMachine(behave: Behaviour, end: number | Error = 0) {
  const results: FileResult[] = [];
  const queue = { profile: "newest" as const, files: [...FILES] };
  let told: string | undefined;
  await runMachine(queue, {
    timeout: 1000,
    environment: {},
    report: (result) => results.push(result),
    start: async () => ({
      tell: (line: string) => {
        told = line;
      },
      finished: async (_timeout: number, onOutput: (text: string) => void) => {
        const say = (message: FileMessage) => onOutput(`${JSON.stringify(message)}\n`);
        for (;;) {
          if (end instanceof Error) throw end;
          say({ free: true });
          if (told === undefined || told === "") return end;
          const result = behave(told);
          if (result instanceof Error) throw result;
          say({ result });
        }
      },
      [Symbol.asyncDispose]: async () => {},
    }),
  });
  return { results, rest: queue.files };
}

test("a machine runs file after file until none is left; results carry its name", async () => {
  const { results, rest } = await inMachine(passed);
  expect(results.map(({ file }) => file)).toEqual(FILES.map((file) => `${file} (newest)`));
  expect(rest).toEqual([]);
});

test("a machine that dies is the failure of the file that ran, and the rest is there for another one", async () => {
  const { results, rest } = await inMachine((file) => (file === FILES[1] ? new Error("panic") : passed(file)));
  expect(results.map(({ problems }) => problems.length)).toEqual([0, 1]);
  expect(results[1]!.file).toStartWith(FILES[1]);
  expect(results[1]!.output).toContain("panic");
  expect(rest).toEqual([FILES[2]]);
});

test("a machine that never comes up is the failure of the next file", async () => {
  const { results, rest } = await inMachine(passed, new Error("no boot"));
  expect(results.map(({ file, problems }) => [file, problems.length])).toEqual([[`${FILES[0]} (newest)`, 1]]);
  expect(rest).toEqual([FILES[1], FILES[2]]);
});

test("a machine that ends with another code than 0 is a failure, also behind its last file", async () => {
  const { results } = await inMachine(passed, 1);
  expect(results.map(({ problems }) => problems.length)).toEqual([0, 0, 0, 1]);
  expect(results[3]!.file).toStartWith(FILES[2]);
});

test("messages come in pieces, and what is none is kept", () => {
  const messages: FileMessage[] = [];
  const noise: string[] = [];
  const read = lineReader((message) => messages.push(message), noise);
  for (const piece of ['{"fr', 'ee":true}\nwarning\n{"free"', ":true}\n"]) read(piece);
  expect(messages).toEqual([{ free: true }, { free: true }]);
  expect(noise).toEqual(["warning"]);
});

async function no(what: string): Promise<never> {
  throw new Error(`no ${what} [at all]\nand more`);
}

/** Names of what is skipped, where the guest or the machines cannot be had. */
async function skippedWithout(guest: () => Promise<void>): Promise<string[]> {
  const shown: FileResult[] = [];
  const options = { timeout: 1000, iommufd: false, long: false, show: (result: FileResult) => shown.push(result) };
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

test("a long run takes more files to other machines", async () => {
  const runs = async (long: boolean) => {
    const options = { timeout: 1000, iommufd: false, long, show: () => {} };
    const files = ["test/vfio/address-space.test.ts", "test/vfio/boots.test.ts"];
    const results = await runMachineTier(files, options, { guest: () => no("packages"), machine: async () => {} });
    return results.map(({ file }) => file).filter((file) => file.endsWith("(oldest)"));
  };
  const boots = "test/vfio/boots.test.ts (oldest)";
  expect(await runs(false)).toEqual([boots]);
  expect((await runs(true)).toSorted()).toEqual(["test/vfio/address-space.test.ts (oldest)", boots]);
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
