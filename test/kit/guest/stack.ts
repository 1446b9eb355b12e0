import { mkdir } from "node:fs/promises";
import { join } from "node:path";
import { Child } from "./child.ts";

const ROOT = join(import.meta.dir, "../../..");
const START_TIMEOUT = 15_000;
const PF = "0000:5a:00.0";

/** How the PF moves the state of its VF: by the vendor's admin commands, or not at all, so that its registers must do. */
export type Migration = "none" | "vendor";

export interface StackOptions {
  /** Where both processes have their files. */
  readonly directory: string;
  /** Device class of the VFs; blk unless said. */
  readonly deviceClass?: string;
  /** How many; 1 unless said. */
  readonly vfs?: number;
  /** Option of the class: virtqueues of each VF, or whatever it counts. 1 unless said. */
  readonly queues?: number;
  /** Disk image of the VFs, where their class has one. */
  readonly disk?: string;
  /** `vendor` unless said. */
  readonly migration?: Migration;
  /** vfe-softvf's configuration file, in place of all of these. The first of its PFs is to have the address of this stack's. */
  readonly config?: string;
  /** More options of vfe-softvf. */
  readonly softvf?: readonly string[];
  /** Words in front of vfe-softvf's command: those of a network namespace, say. */
  readonly prefix?: readonly string[];
}

export interface CliResult {
  readonly code: number;
  /** Standard output and, after it, standard error. */
  readonly output: string;
}

/** The two processes of a machine with software VFs, vfe-softvf and vfe-vhostd, and the command line that drives them. */
export class Stack implements AsyncDisposable {
  /** Of the first VF. */
  readonly vf = "0000:5a:00.1";
  readonly pf = PF;
  private running: Child | undefined;
  /** How many daemons were started. */
  private daemons = 0;

  private constructor(
    private readonly options: StackOptions,
    readonly softvf: Child,
  ) {}

  /** Starts the software PF; the daemon is started apart. */
  static async start(options: StackOptions): Promise<Stack> {
    const runtime = join(options.directory, "softvf");
    const softvf = new Child(
      [
        ...(options.prefix ?? []),
        ...program("vfe-softvf"),
        ...(options.config === undefined ? functionOptions(options) : ["--config", options.config]),
        ...["--runtime-dir", runtime, ...(options.softvf ?? [])],
      ],
      { name: "vfe-softvf", log: join(options.directory, "softvf.log") },
    );
    const stack = new Stack(options, softvf);
    try {
      await softvf.line(/^ready /m, START_TIMEOUT);
    } catch (error) {
      await softvf[Symbol.asyncDispose]();
      throw error;
    }
    return stack;
  }

  /** Address of a VF, counted from 0. There are at most seven. */
  vfAddress(index: number): string {
    return PF.replace(/0$/, `${index + 1}`);
  }

  get daemon(): Child {
    if (!this.running) throw new Error("the daemon was not started");
    return this.running;
  }

  /** Starts the daemon and waits until it takes commands. */
  async startDaemon(): Promise<void> {
    const runtime = this.runtimeDirectory;
    await mkdir(runtime, { recursive: true });
    const bus = join(this.options.directory, "softvf/devices");
    const daemon = new Child([...program("vhostd"), "--runtime-dir", runtime, "--bus", bus], {
      name: "vfe-vhostd",
      log: join(this.options.directory, `vhostd${this.daemons++}.log`),
    });
    this.running = daemon;
    await daemon.line(/^ready /m, START_TIMEOUT);
  }

  /** Ends the daemon as an operator does (SIGTERM). */
  async stopDaemon(): Promise<void> {
    await this.daemon[Symbol.asyncDispose]();
    this.running = undefined;
  }

  /** Adds the PF and the VF. @param more options of `vf -a` */
  async addVf(socket: string, ...more: string[]): Promise<void> {
    await this.command("mgmtpf", "-a", this.pf);
    await this.command("vf", "-a", this.vf, "-v", socket, ...more);
  }

  /** Runs vfe-vhost-cli. @throws Error when it fails */
  async command(...words: string[]): Promise<string> {
    const { code, output } = await this.cli(...words);
    if (code !== 0) throw new Error(`vfe-vhost-cli ${words.join(" ")} ended with ${code}: ${output}`);
    return output;
  }

  /** Runs vfe-vhost-cli. */
  cli(...words: string[]): Promise<CliResult> {
    return this.runProgram("vfe-vhost-cli", words, { VFE_VHOSTD_RUNTIME_DIR: this.runtimeDirectory });
  }

  /** What `vf -i` says of a VF. */
  async vfInfo(address = this.vf): Promise<Readonly<Record<string, unknown>>> {
    return JSON.parse(await this.command("vf", "-i", address)).device;
  }

  /** Changes properties of the first VF's device, as an operator of the software PF does. */
  setDevice(...properties: string[]): Promise<void> {
    return this.set(this.vf, properties);
  }

  /** Changes properties of the PF itself. */
  setPf(...properties: string[]): Promise<void> {
    return this.set(this.pf, properties);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.running?.[Symbol.asyncDispose]();
    await this.softvf[Symbol.asyncDispose]();
  }

  private get runtimeDirectory(): string {
    return join(this.options.directory, "vhostd");
  }

  /** Changes properties of a function, as an operator of the software PF does. */
  async set(address: string, properties: readonly string[]): Promise<void> {
    await this.softvfCommand("set", address, ...properties);
  }

  /** Runs a command of vfe-softvf that speaks to the running one. @throws Error when it fails */
  async softvfCommand(...command: string[]): Promise<string> {
    const words = [...command, "--runtime-dir", join(this.options.directory, "softvf")];
    const { code, output } = await this.runProgram("vfe-softvf", words);
    if (code !== 0) throw new Error(`vfe-softvf ${words.join(" ")} ended with ${code}: ${output}`);
    return output;
  }

  private async runProgram(
    name: string,
    words: readonly string[],
    environment: Record<string, string> = {},
  ): Promise<CliResult> {
    const child = Bun.spawn([...program(name), ...words], {
      env: { ...process.env, ...environment },
      stdio: ["ignore", "pipe", "pipe"],
    });
    const [text, errors, code] = await Promise.all([child.stdout.text(), child.stderr.text(), child.exited]);
    return { code, output: text + errors };
  }
}

function functionOptions({
  deviceClass = "blk",
  vfs = 1,
  queues = 1,
  disk,
  migration = "vendor",
}: StackOptions): string[] {
  return [
    ...["--pf", PF, "--class", deviceClass, "--vfs", `${vfs}`, "--queues", `${queues}`, "--migration", migration],
    ...(disk === undefined ? [] : ["--disk", disk]),
  ];
}

function program(name: string): string[] {
  return [process.execPath, join(ROOT, "bin", `${name}.ts`)];
}
