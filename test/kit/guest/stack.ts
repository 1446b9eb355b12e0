import { readFileSync } from "node:fs";
import { mkdir } from "node:fs/promises";
import { join } from "node:path";
import { Deadline } from "../../../src/base/deadline.ts";
import { RpcClient } from "../../../src/rpc/client.ts";
import { rpcSocket } from "../../../src/runtime-directory.ts";
import { Child } from "./child.ts";

const ROOT = join(import.meta.dir, "../../..");
/** Milliseconds. */
const START_TIMEOUT = 15_000;
const CALL_TIMEOUT = 20_000;
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
  /** vfe-vhostd's configuration file; none unless said. */
  readonly daemonConfig?: string;
  /** From the top of the checkout; bin/vhostd.ts unless said. */
  readonly daemonProgram?: string;
}

export interface CliResult {
  readonly code: number;
  /** Standard output and, after it, standard error. */
  readonly output: string;
}

/**
 * The processes of a machine with software VFs, vfe-softvf and vfe-vhostd, the keeper where a test wants one, and the command
 * line that drives them.
 */
export class Stack implements AsyncDisposable {
  /** Of the first VF. */
  readonly vf = "0000:5a:00.1";
  readonly pf = PF;
  private running: Child | undefined;
  private runningKeeper: Child | undefined;
  /** How many daemons were started. */
  private daemons = 0;
  private keepers = 0;

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

  get keeper(): Child {
    if (!this.runningKeeper) throw new Error("the keeper was not started");
    return this.runningKeeper;
  }

  /** Starts the daemon and waits until it takes commands. */
  async startDaemon(): Promise<void> {
    await mkdir(this.runtimeDirectory, { recursive: true });
    this.spawnDaemon();
    await this.daemonReady();
  }

  /** SIGKILL, and another one at once, which is not waited for. */
  async replaceDaemon(): Promise<void> {
    await this.daemon.kill();
    this.spawnDaemon();
  }

  /** Waits until the daemon takes commands. */
  async daemonReady(): Promise<void> {
    await this.daemon.line(/^ready /m, START_TIMEOUT);
  }

  /** Starts a keeper, which the daemon finds by itself, and waits until it serves. */
  async startKeeper(): Promise<void> {
    await mkdir(this.runtimeDirectory, { recursive: true });
    this.runningKeeper = new Child([...program("vhostd-ha"), "--runtime-dir", this.runtimeDirectory], {
      name: "vfe-vhostd-ha",
      log: join(this.options.directory, `keeper${this.keepers++}.log`),
    });
    await this.runningKeeper.line(/^ready /m, START_TIMEOUT);
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

  /** Calls the daemon's control interface. */
  async call<T = unknown>(method: string, params: Readonly<Record<string, unknown>> = {}): Promise<T> {
    const deadline = Deadline.after(CALL_TIMEOUT, method);
    using client = await RpcClient.connect(rpcSocket(this.runtimeDirectory), deadline);
    return (await client.call(method, params, deadline)) as T;
  }

  /** What the last two daemons have written, for a test that fails. */
  get story(): string {
    return [this.daemons - 2, this.daemons - 1]
      .filter((number) => number >= 0)
      .map((number) => readFileSync(this.daemonLog(number), "utf8"))
      .join("---- the next one\n");
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
    // The keeper first: without it the daemon lets go of everything.
    await this.runningKeeper?.kill();
    await this.running?.[Symbol.asyncDispose]();
    await this.softvf[Symbol.asyncDispose]();
  }

  private get runtimeDirectory(): string {
    return join(this.options.directory, "vhostd");
  }

  private spawnDaemon(): void {
    const { directory, daemonConfig, daemonProgram = "bin/vhostd.ts" } = this.options;
    this.running = new Child(
      [
        ...[process.execPath, join(ROOT, daemonProgram), "--runtime-dir", this.runtimeDirectory],
        ...["--bus", join(directory, "softvf/devices")],
        ...(daemonConfig === undefined ? [] : ["--config", daemonConfig]),
      ],
      { name: "vfe-vhostd", log: this.daemonLog(this.daemons++) },
    );
  }

  private daemonLog(number: number): string {
    return join(this.options.directory, `vhostd${number}.log`);
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
