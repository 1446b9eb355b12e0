import { basename } from "node:path";
import { LONG_VARIABLE } from "../test/kit/at-length.ts";
import { buildGuestImage } from "../test/kit/guest/image.ts";
import type { MachineOptions } from "../test/kit/machine/description.ts";
import { buildMachineImage } from "../test/kit/machine/image.ts";
import { type MachineCommand, MachineRun } from "../test/kit/machine/machine-run.ts";
import { buildOwnKernel, findOwnKernel } from "../test/kit/machine/own-kernel.ts";
import { PROGRAMS_VARIABLE } from "../test/kit/machine/programs.ts";
import { bringNewerQemu } from "../test/kit/machine/qemu.ts";
import { ALSO_IN, ALSO_IN_LONG, LONG_PROCESSORS, LONGEST, PROFILES, type ProfileName } from "../test/vfio/profiles.ts";
import { ROOT } from "./command.ts";
import { MachinePrograms } from "./machine-programs.ts";
import { updatePackageLists } from "./packages.ts";
import { prepareGuest } from "./preparation.ts";
import type { FileResult } from "./test-file.ts";

/** What machine-files.ts says as it goes on. To "free" it is answered with the next file, or an empty line. */
export type FileMessage = { readonly free: true } | { readonly result: FileResult };

export interface MachineTierOptions {
  /** Milliseconds for a file. */
  readonly timeout: number;
  /** All of them in the kernel with iommufd, too, built now where it was not. Where it was, some run there in any case. */
  readonly iommufd: boolean;
  /** Full counts, and more of them in more than one machine. */
  readonly long: boolean;
  /** Takes a result when it is there. */
  readonly show: (result: FileResult) => void;
}

/** What is still to be run in machines of a profile, which take one file after the other. */
interface Queue {
  readonly profile: ProfileName;
  readonly files: string[];
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
  const queues: Queue[] = [];
  const noGuest = files.length === 0 ? undefined : await bring.guest().then(nothing, reasonOf);
  const noMachine = (error: unknown) => `the VM with an IOMMU cannot be made: ${reasonOf(error)}`;
  for (const profile of await profiles(options.iommufd)) {
    const own = files.filter((file) => isFor(profile, basename(file), options));
    const machine = () => bring.machine(profile).then(nothing, noMachine);
    const missing = own.length === 0 ? undefined : (noGuest ?? (await machine()));
    if (missing === undefined) queues.push({ profile, files: longestFirst(own) });
    else for (const file of own) report(skipped(named(file, profile), missing));
  }
  if (queues.every((queue) => queue.files.length === 0)) return results;
  await using programs = await MachinePrograms.build();
  const environment = { [PROGRAMS_VARIABLE]: programs.directory, ...(options.long ? { [LONG_VARIABLE]: "1" } : {}) };
  const begun: Queue[] = [];
  const worker = async () => {
    for (let queue = next(queues, begun); queue !== undefined; queue = next(queues, begun)) {
      begun.push(queue);
      await runMachine(queue, { timeout: options.timeout, environment, report });
    }
  };
  await Promise.all(Array.from({ length: MACHINES }, worker));
  return results;
}

/** The next machine's: one that no machine has begun with, where there is one. */
function next(queues: readonly Queue[], begun: readonly Queue[]): Queue | undefined {
  const left = queues.filter(({ files }) => files.length > 0);
  return left.find((queue) => !begun.includes(queue)) ?? left[0];
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

function isFor(profile: ProfileName, file: string, { iommufd, long }: MachineTierOptions): boolean {
  if (profile === "newest" || (profile === "iommufd" && iommufd)) return true;
  return ALSO_IN[profile].includes(file) || (long && ALSO_IN_LONG[profile].includes(file));
}

/** Those with few files first: at the end two machines share what the newest has left, and so end together. */
async function profiles(iommufd: boolean): Promise<ProfileName[]> {
  return iommufd || (await findOwnKernel()) !== undefined ? ["iommufd", "oldest", "newest"] : ["oldest", "newest"];
}

function longestFirst(files: readonly string[]): string[] {
  const rank = (file: string) => {
    const place = LONGEST.indexOf(basename(file));
    return place === -1 ? LONGEST.length : place;
  };
  return files.toSorted((a, b) => rank(a) - rank(b));
}

/** What starts a machine: MachineRun.start, but in its own tests. */
type Start = (
  options: MachineOptions,
  command: MachineCommand,
) => Promise<Pick<MachineRun, "finished" | "tell"> & AsyncDisposable>;

export interface MachineFilesOptions {
  /** Milliseconds for a file. */
  readonly timeout: number;
  readonly environment: Readonly<Record<string, string>>;
  readonly report: (result: FileResult) => void;
  readonly start?: Start;
}

/** Runs files in one machine until none is left in the queue, or the machine dies, which is reported of a file. */
export async function runMachine(
  { profile, files }: Queue,
  { timeout, environment, report, start = MachineRun.start }: MachineFilesOptions,
): Promise<void> {
  let running: string | undefined;
  let last: string | undefined;
  const words = [process.execPath, "tools/machine-files.ts", `${timeout}`];
  const started = performance.now();
  const noise: string[] = [];
  try {
    await using machine = await start(
      LONG_VARIABLE in environment ? { ...PROFILES[profile], processors: LONG_PROCESSORS } : PROFILES[profile],
      { words, directory: ROOT, environment },
    );
    const receive = (message: FileMessage) => {
      if ("free" in message) {
        running = files.shift();
        machine.tell(running ?? "");
      } else {
        [last, running] = [running, undefined];
        report({ ...message.result, file: named(message.result.file, profile) });
      }
    };
    const total = PATIENCE + files.length * (timeout + PATIENCE);
    const code = await machine.finished(total, lineReader(receive, noise), timeout + PATIENCE);
    if (running !== undefined || code !== 0) throw new Error(`machine-files.ts ended with ${code} before it was to`);
  } catch (error) {
    // It is the failure of the file that ran, or of the next one where the machine did not come to any.
    const file = running ?? last ?? files.shift() ?? "no file";
    const seconds = (performance.now() - started) / 1000;
    const output = [...noise, error instanceof Error ? error.message : `${error}`].join("\n");
    report({
      file: named(file, profile),
      seconds,
      output,
      cases: [],
      problems: ["the machine did not run it to its end"],
    });
  }
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
