import { existsSync } from "node:fs";
import { mkdtemp, readdir, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { LONG_VARIABLE } from "../test/kit/at-length.ts";
import { defineTask, ROOT, UsageError } from "./command.ts";
import { runMachineTier } from "./machine-tier.ts";
import { runNativeTests } from "./native-tests.ts";
import { type Part, prepare } from "./preparation.ts";
import { type FileResult, notesOf, runTestFile } from "./test-file.ts";

interface Tier {
  readonly description: string;
  readonly needs: readonly Part[];
}

/** In the order of a full run: the quickest answer first. A tier is the folder of its name under test/, but for "native". */
const TIERS = {
  unit: { description: "parts on their own", needs: ["native"] },
  fuzz: { description: "random input, briefly", needs: ["native"] },
  loopback: { description: "our own front-end against the daemon", needs: ["native"] },
  native: { description: "native/ under the sanitizers", needs: ["native"] },
  guest: { description: "Linux guests in QEMU", needs: ["native", "guest", "debian"] },
  // It brings its guest itself: where it cannot, it is skipped.
  vfio: { description: "in a VM with an IOMMU", needs: ["native"] },
} as const satisfies Record<string, Tier>;
type TierName = keyof typeof TIERS;

/** Where test files of a tier are beside its own folder: those of plugins that are kept as if they were elsewhere. */
const MORE_FOLDERS: Partial<Record<TierName, readonly string[]>> = { loopback: ["examples"] };

/** Words for files of a subject, whatever their tier: the beginning of their names. */
const SUBJECTS: Readonly<Record<string, string>> = { ha: "/ha-" };

/** Test processes at a time. More than the processors only makes the guests slower. */
const WORKERS = Math.min(navigator.hardwareConcurrency, 4);

/** Milliseconds after which a file is ended, whatever its tests think. */
const FILE_TIMEOUT = 300_000;
/** How much longer a file of a long run may take. */
const LONGER = 6;

/** What all files of a run have in common. */
interface RunOptions {
  readonly scratch: string;
  readonly environment: Readonly<Record<string, string>>;
  readonly timeout: number;
  readonly iommufd: boolean;
  readonly long: boolean;
}

/** What is run: files of these tiers that have one of the filters in their names; all of them where there is no filter. */
interface Selection {
  readonly tiers: readonly TierName[];
  readonly filters: readonly string[];
  /** The vfio tier also with the kernel that has iommufd, which is built where it was not. */
  readonly iommufd?: boolean;
  /** With full counts (test/kit/at-length.ts). */
  readonly long?: boolean;
}

interface Totals {
  passed: number;
  failed: number;
  skipped: number;
}

export default defineTask({
  name: "test",
  description: `Run tests; tiers: ${Object.entries(TIERS)
    .map(([name, tier]) => `${name} (${tier.description})`)
    .join(", ")}`,
  args: {
    iommufd: {
      type: "boolean",
      description: "vfio also with a kernel that has iommufd, which takes minutes to build once",
    },
    long: {
      type: "boolean",
      description:
        "full counts: more VMs moved, ten times the requests and frames in vfio, and more files in its other kernels",
    },
    tiers: {
      type: "positional",
      required: false,
      description: "Tiers to run, parts of file names, or ha for all that begin with ha-; all tiers unless given",
    },
  },
  run: ({ _: words, iommufd = false, long = false }) => runTests({ ...understand(words), iommufd, long }),
});

/**
 * Runs tests and prints what they came to; the last line is "N passed, N failed, N skipped".
 * @param environment for the test processes
 * @param timeout milliseconds for each file
 * @returns the exit code: a skip is no failure, a run without any test is one
 * @throws UsageError where a part of a file name is in none
 */
export async function runTests(
  { tiers, filters, iommufd = false, long = false }: Selection,
  environment: Readonly<Record<string, string>> = {},
  timeout = FILE_TIMEOUT,
): Promise<number> {
  const files = (await Promise.all(tiers.map(filesOf))).flat();
  const unknown = filters.find((part) => !files.some((file) => file.includes(part)));
  if (unknown !== undefined) throw new UsageError(`no test file of ${tiers.join(", ")} has "${unknown}" in its name`);
  await prepare(...new Set(tiers.flatMap((tier) => TIERS[tier].needs)));
  const totals: Totals = { passed: 0, failed: 0, skipped: 0 };
  const notes: string[] = [];
  const scratch = await mkdtemp(join(tmpdir(), "vt-"));
  try {
    for (const tier of tiers) {
      const started = performance.now();
      const results =
        tier === "native"
          ? await runNativeTests()
          : await runFolder(tier, filters, {
              ...{ scratch, environment, iommufd, long },
              timeout: long ? timeout * LONGER : timeout,
            });
      for (const result of results) count(result, totals, notes);
      console.log(`${tier}: ${results.length} files in ${((performance.now() - started) / 1000).toFixed(1)} s`);
    }
  } finally {
    await rm(scratch, { recursive: true, force: true });
  }
  for (const note of notes) console.log(note);
  console.log(`${totals.passed} passed, ${totals.failed} failed, ${totals.skipped} skipped`);
  return totals.failed === 0 && totals.passed + totals.skipped > 0 ? 0 : 1;
}

/** Splits the command line into names of tiers and parts of file names. Native tests are a tier, never a file. */
function understand(words: readonly string[]): Selection {
  const names = Object.keys(TIERS) as TierName[];
  const tiers = names.filter((name) => words.includes(name));
  const parts = words.filter((word) => !(names as string[]).includes(word));
  const filters = parts.map((part) => SUBJECTS[part] ?? part);
  if (tiers.length > 0) return { tiers, filters };
  return { tiers: filters.length > 0 ? names.filter((name) => name !== "native") : names, filters };
}

/** The test files of a tier, from the top of the checkout. */
async function filesOf(tier: TierName): Promise<string[]> {
  const folders = [join("test", tier), ...(MORE_FOLDERS[tier] ?? [])].filter((folder) =>
    existsSync(join(ROOT, folder)),
  );
  const files = folders.map(async (folder) => {
    const names = await readdir(join(ROOT, folder), { recursive: true });
    return names.filter((name) => name.endsWith(".test.ts")).map((name) => join(folder, name));
  });
  return (await Promise.all(files)).flat();
}

async function runFolder(tier: TierName, filters: readonly string[], options: RunOptions): Promise<FileResult[]> {
  const present = await filesOf(tier);
  if (present.length === 0) return [noTests(join("test", tier))];
  const files = present.filter((file) => filters.length === 0 || filters.some((part) => file.includes(part))).sort();
  if (tier === "vfio") return runMachineTier(files, { ...options, show });
  const results: FileResult[] = [];
  const { long, timeout } = options;
  const environment = { ...options.environment, ...(long ? { [LONG_VARIABLE]: "1" } : {}) };
  const queue = files.entries();
  const worker = async () => {
    for (const [index, file] of queue) {
      const result = await runTestFile(file, {
        scratch: join(options.scratch, `${tier[0]}${index}`),
        environment,
        timeout,
      });
      show(result);
      results.push(result);
    }
  };
  await Promise.all(Array.from({ length: WORKERS }, worker));
  return results;
}

/** A tier without files is a failure: it would pass for ever. */
function noTests(folder: string): FileResult {
  return { file: folder, seconds: 0, output: "", cases: [], problems: ["has no test files"] };
}

/** One line for a file that went well, all its output for one that did not. */
function show(result: FileResult): void {
  const failed = result.problems.length > 0 || result.cases.some((test) => test.outcome === "failed");
  const line = `${failed ? "FAIL" : "ok  "} ${result.file} (${result.cases.length} tests, ${result.seconds.toFixed(1)} s)`;
  console.log(failed ? `${result.output.trimEnd()}\n${line}` : line);
  for (const problem of result.problems) console.log(`  problem: ${problem}`);
}

function count(result: FileResult, totals: Totals, notes: string[]): void {
  for (const test of result.cases) totals[test.outcome]++;
  totals.failed += result.problems.length;
  notes.push(...notesOf(result));
}
