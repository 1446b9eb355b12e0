import { appendFileSync } from "node:fs";
import { mkdir, mkdtemp, open, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { basename, dirname, join } from "node:path";
import { Deadline } from "../../../src/base/deadline.ts";
import { Child } from "../guest/child.ts";
import { diskImage, machineArguments } from "./command-line.ts";
import { DESCRIPTION_VARIABLE, describe, INPUT_INSIDE, type MachineOptions } from "./description.ts";
import { buildMachineImage } from "./image.ts";
import { bringNewerQemu, SYSTEM_QEMU } from "./qemu.ts";

/** Where the share is inside, and what is in it. */
const SHARE_INSIDE = dirname(INPUT_INSIDE);
const DESCRIPTION = "machine.json";
const START = "start";
const OUTPUT = "output";
const INPUT = basename(INPUT_INSIDE);
const EXIT = "exit";

export interface MachineCommand {
  readonly words: readonly string[];
  readonly directory: string;
  /** Beside the few variables of ours that a program needs to be found. */
  readonly environment?: Readonly<Record<string, string>>;
}

/** A machine that runs one command and is then gone. */
export class MachineRun implements AsyncDisposable {
  private constructor(
    /** A folder on the host that the machine has at SHARE_INSIDE. */
    readonly share: string,
    private readonly qemu: Child,
    private readonly work: string,
  ) {}

  /** Starts QEMU; brings first what it boots. @throws Error when that cannot be had */
  static async start(options: MachineOptions, command: MachineCommand): Promise<MachineRun> {
    const image = await buildMachineImage(options.kernel);
    const qemu = options.sriov ? await bringNewerQemu() : SYSTEM_QEMU;
    const description = describe(options);
    const work = await mkdtemp(join(tmpdir(), "vm-"));
    try {
      const paths = { work, share: join(work, "share"), console: join(work, "console") };
      await mkdir(paths.share);
      await writeFile(join(paths.share, DESCRIPTION), JSON.stringify(description, null, 2));
      await writeFile(join(paths.share, START), startScript(command));
      for (const name of [OUTPUT, INPUT]) await writeFile(join(paths.share, name), "");
      for (const one of description.functions) {
        if (one.size === undefined) continue;
        await using disk = await open(diskImage(work, one), "w");
        await disk.truncate(one.size * 2 ** 20);
      }
      const parameters = command.directory.startsWith("/tmp/") ? ["machine_tmp=host"] : [];
      const line = [...qemu.command, ...machineArguments(description, image, paths, parameters)];
      const child = new Child(line, { name: "QEMU", log: join(work, "qemu.log"), environment: qemu.environment });
      return new MachineRun(paths.share, child, work);
    } catch (error) {
      await rm(work, { recursive: true, force: true });
      throw error;
    }
  }

  get running(): boolean {
    return this.qemu.running;
  }

  /** One more line in INPUT_INSIDE. */
  tell(line: string): void {
    appendFileSync(join(this.share, INPUT), `${line}\n`);
  }

  /**
   * Waits for the command's end.
   * @param timeout milliseconds
   * @param onOutput takes what it writes, as it comes
   * @param silence milliseconds in which it must write something
   * @returns its exit code
   * @throws Error with the end of the kernel's console where the machine ended without one; VhostdError timedOut
   */
  async finished(timeout: number, onOutput: (text: string) => void, silence = timeout): Promise<number> {
    let shown = 0;
    let patience = Deadline.after(silence, "silence of the command in the machine");
    const decoder = new TextDecoder();
    const show = async () => {
      const content = await readFile(join(this.share, OUTPUT));
      if (content.length === shown) return;
      onOutput(decoder.decode(content.subarray(shown), { stream: true }));
      shown = content.length;
      patience = Deadline.after(silence, patience.what);
    };
    const deadline = Deadline.after(timeout, "the command in the machine");
    try {
      await deadline.poll(async () => {
        // Looked at before the output: what was written until the end is then shown.
        const ended = !this.running;
        await show();
        patience.check();
        return ended || undefined;
      }, 50);
    } catch (error) {
      throw new Error(`${error instanceof Error ? error.message : error}\n${await this.complaint()}`);
    }
    const code = await readFile(join(this.share, EXIT), "utf8").catch(() => undefined);
    if (code === undefined) throw new Error(`the machine ended before the command did\n${await this.complaint()}`);
    return Number(code);
  }

  /** What QEMU and the kernel said last. */
  async complaint(): Promise<string> {
    const console = await readFile(join(this.work, "console"), "utf8").catch(() => "");
    const lines = [...this.qemu.tail().split("\n"), ...console.trimEnd().split("\n").slice(-25)];
    return lines.filter((line) => line.trim() !== "").join("\n");
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.qemu.kill();
    await rm(this.work, { recursive: true, force: true });
  }
}

/** What init starts, as the first process: when it ends without having turned the machine off, the kernel panics. */
function startScript({ words, directory, environment = {} }: MachineCommand): string {
  const variables = {
    PATH: process.env["PATH"] ?? "/usr/bin:/bin",
    HOME: process.env["HOME"] ?? "/root",
    LANG: "C.UTF-8",
    ...environment,
    [DESCRIPTION_VARIABLE]: join(SHARE_INSIDE, DESCRIPTION),
  };
  const exports = Object.entries(variables).map(([name, value]) => `export ${name}=${quoted(value)}`);
  const share = (name: string) => join(SHARE_INSIDE, name);
  return [
    ...exports,
    `(cd ${quoted(directory)} && exec ${words.map(quoted).join(" ")}) > ${share(OUTPUT)} 2>&1 < /dev/null`,
    `echo $? > ${share(EXIT)}.new && mv ${share(EXIT)}.new ${share(EXIT)}`,
    "sync",
    "exec /run/busybox poweroff -f",
    "",
  ].join("\n");
}

function quoted(word: string): string {
  return `'${word.replaceAll("'", `'\\''`)}'`;
}
