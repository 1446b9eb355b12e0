import { basename } from "node:path";
import { buildGuestImage } from "../test/kit/guest/image.ts";
import type { MachineOptions } from "../test/kit/machine/description.ts";
import { buildMachineImage } from "../test/kit/machine/image.ts";
import { type MachineCommand, MachineRun } from "../test/kit/machine/machine-run.ts";
import { buildOwnKernel, findOwnKernel } from "../test/kit/machine/own-kernel.ts";
import { bringNewerQemu } from "../test/kit/machine/qemu.ts";
import { ALSO_IN, PROFILES, type ProfileName } from "../test/vfio/profiles.ts";
import { ROOT } from "./command.ts";
import { updatePackageLists } from "./packages.ts";
import { prepareGuest } from "./preparation.ts";
import type { FileResult } from "./test-file.ts";

/** What machine-files.ts says as it goes on. */
export type FileMessage = { readonly started: string } | { readonly result: FileResult };

export interface MachineTierOptions {
  /** Milliseconds for a file. */
  readonly timeout: number;
  /** All of them in the kernel with iommufd, too, built now where it was not. Where it was, some run there in any case. */
  readonly iommufd: boolean;
  /** Takes a result when it is there. */
  readonly show: (result: FileResult) => void;
}

/** Files that one machine runs, one after the other. */
interface Batch {
  readonly profile: ProfileName;
  readonly files: readonly string[];
}

/** At a time. */
const MACHINES = 2;
/** Milliseconds of silence beside a file's time: a boot, on a busy machine. */
const PATIENCE = 120_000;

/** What machines and the guests in them need, from Debian's packages. Each throws an Error when it cannot be had. */
interface Bring {
  readonly guest: () => Promise<void>;
  readonly machine: (profile: ProfileName) => Promise<void>;
}

/**
 * Runs test files in machines with an IOMMU (test/kit/machine), each file in each profile that it is for. Those that cannot
 * be run for want of packages are skipped.
 */
export async function runMachineTier(
  files: readonly string[],
  options: MachineTierOptions,
  bring: Bring = { guest: prepareGuest, machine: bringMachine },
): Promise<FileResult[]> {
  const results: FileResult[] = [];
  const report = (result: FileResult) => {
    options.show(result);
    results.push(result);
  };
  const queue: Batch[] = [];
  const noGuest = files.length === 0 ? undefined : await bring.guest().then(nothing, reasonOf);
  const noMachine = (error: unknown) => `the VM with an IOMMU cannot be made: ${reasonOf(error)}`;
  for (const profile of await profiles(options.iommufd)) {
    const own = files.filter((file) => isFor(profile, basename(file), options.iommufd));
    const machine = () => bring.machine(profile).then(nothing, noMachine);
    const missing = own.length === 0 ? undefined : (noGuest ?? (await machine()));
    if (missing === undefined) queue.push(...halves(own).map((half) => ({ profile, files: half })));
    else for (const file of own) report(skipped(named(file, profile), missing));
  }
  const worker = async () => {
    for (let batch = queue.shift(); batch !== undefined; batch = queue.shift()) {
      const rest = await runBatch(batch, options.timeout, report);
      if (rest.length > 0) queue.unshift({ profile: batch.profile, files: rest });
    }
  };
  await Promise.all(Array.from({ length: MACHINES }, worker));
  return results;
}

/**
 * Brings what the machine of a profile boots, from Debian's packages.
 * @throws Error when it cannot be had
 */
export async function bringMachine(profile: ProfileName): Promise<void> {
  const { kernel, sriov } = PROFILES[profile];
  const bring = async () => {
    if (kernel === "iommufd") {
      await buildOwnKernel((text) => console.error(text));
      // Guests of tests in any machine boot with it, too; inside there is no network to get the rest of them.
      await buildGuestImage("small");
    }
    await buildMachineImage(kernel);
    if (sriov) await bringNewerQemu();
  };
  await withFreshLists(bring, updatePackageLists);
}

/** Once more after apt's lists were refreshed: they may be older than what the mirror still has. @throws Error the first one */
export async function withFreshLists(bring: () => Promise<void>, refresh: () => Promise<void>): Promise<void> {
  try {
    await bring();
  } catch (first) {
    await refresh().catch(() => {
      throw first;
    });
    await bring();
  }
}

function isFor(profile: ProfileName, file: string, iommufd: boolean): boolean {
  return profile === "newest" || (profile === "iommufd" && iommufd) || ALSO_IN[profile].includes(file);
}

async function profiles(iommufd: boolean): Promise<ProfileName[]> {
  return iommufd || (await findOwnKernel()) !== undefined ? ["newest", "iommufd", "oldest"] : ["newest", "oldest"];
}

/** Two machines share the files of a profile. */
function halves(files: readonly string[]): string[][] {
  return [0, 1].map((half) => files.filter((_, index) => index % 2 === half)).filter((half) => half.length > 0);
}

/** What starts a machine: MachineRun.start, but in its own tests. */
type Start = (
  options: MachineOptions,
  command: MachineCommand,
) => Promise<Pick<MachineRun, "finished"> & AsyncDisposable>;

/**
 * Runs files in one machine.
 * @returns the files that are still to be run, because the machine has died
 */
export async function runBatch(
  { profile, files }: Batch,
  timeout: number,
  report: (result: FileResult) => void,
  start: Start = MachineRun.start,
): Promise<readonly string[]> {
  const left = [...files];
  let running: string | undefined;
  const receive = (message: FileMessage) => {
    if ("started" in message) {
      running = message.started;
      return;
    }
    running = undefined;
    left.shift();
    report({ ...message.result, file: named(message.result.file, profile) });
  };
  const words = [process.execPath, "tools/machine-files.ts", `${timeout}`, ...files];
  const started = performance.now();
  const noise: string[] = [];
  try {
    await using machine = await start(PROFILES[profile], { words, directory: ROOT });
    const total = PATIENCE + files.length * (timeout + PATIENCE);
    const code = await machine.finished(total, lineReader(receive, noise), timeout + PATIENCE);
    if (left.length > 0) throw new Error(`machine-files.ts ended with ${code} before all files were run`);
  } catch (error) {
    // It is the failure of the file that ran, or of the next one where the machine did not come to it.
    const file = running ?? left[0] ?? files.at(-1)!;
    const seconds = (performance.now() - started) / 1000;
    const output = [...noise, error instanceof Error ? error.message : `${error}`].join("\n");
    report({
      file: named(file, profile),
      seconds,
      output,
      cases: [],
      problems: ["the machine did not run it to its end"],
    });
    return left.filter((other) => other !== file);
  }
  return [];
}

/** Takes output in pieces; what is no message is kept for the person who looks for a mistake. */
export function lineReader(receive: (message: FileMessage) => void, noise: string[]): (text: string) => void {
  let partial = "";
  return (text) => {
    const lines = (partial + text).split("\n");
    partial = lines.pop() ?? "";
    for (const line of lines) {
      if (line.startsWith("{")) receive(JSON.parse(line) as FileMessage);
      else noise.push(line);
    }
  };
}

function named(file: string, profile: ProfileName): string {
  return `${file} (${profile})`;
}

function skipped(file: string, reason: string): FileResult {
  const name = `all tests [skip: ${reason}]`;
  return { file, seconds: 0, output: "", cases: [{ name, outcome: "skipped" }], problems: [] };
}

function nothing(): undefined {}

/** In one line, without the character that ends a reason in a test's name. */
function reasonOf(error: unknown): string {
  const [line = ""] = (error instanceof Error ? error.message : `${error}`).split("\n");
  return line.replaceAll("]", ")");
}
