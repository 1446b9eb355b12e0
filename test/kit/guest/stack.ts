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
  /** Disk image of the VF. */
  readonly disk: string;
  /** Virtqueues of the VF. */
  readonly queues: number;
  /** `vendor` unless said. */
  readonly migration?: Migration;
}

export interface CliResult {
  readonly code: number;
  /** Standard output and, after it, standard error. */
  readonly output: string;
}

/** The two processes of a machine with software VFs, vfe-softvf and vfe-vhostd, and the command line that drives them. */
export class Stack implements AsyncDisposable {
  /** Of the only VF. */
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
    const { migration = "vendor" } = options;
    const runtime = join(options.directory, "softvf");
    const softvf = new Child(
      [
        ...program("vfe-softvf"),
        ...["--pf", PF, "--class", "blk", "--vfs", "1", "--queues", `${options.queues}`],
        ...["--disk", options.disk, "--migration", migration, "--runtime-dir", runtime],
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

  /** Changes properties of the VF's device, as an operator of the software PF does. */
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

  private async set(address: string, properties: readonly string[]): Promise<void> {
    const words = ["set", address, ...properties, "--runtime-dir", join(this.options.directory, "softvf")];
    const { code, output } = await this.runProgram("vfe-softvf", words);
    if (code !== 0) throw new Error(`vfe-softvf ${words.join(" ")} ended with ${code}: ${output}`);
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

function program(name: string): string[] {
  return [process.execPath, join(ROOT, "bin", `${name}.ts`)];
}
