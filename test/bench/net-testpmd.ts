import { closeSync, openSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { Deadline } from "../../src/base/deadline.ts";

const PROGRAM = "dpdk-testpmd";
const PROMPT = "testpmd> ";
/** Milliseconds. */
const START_TIMEOUT = 20_000;
const COMMAND_TIMEOUT = 10_000;
const END_TIMEOUT = 5_000;
/** Frames that it takes from a queue at once. */
const BURST = 64;
/** MiB of memory, which is no huge page. */
const MEMORY = 256;
const BUFFERS = 8192;

export interface TestpmdPlace {
  /** Takes its files: runtime directory, log. */
  readonly directory: string;
  /** The CPU of the one thread that forwards, and never sleeps meanwhile. */
  readonly cpu: string;
  /** The CPU of the thread that takes commands, and sleeps otherwise. */
  readonly otherCpu: string;
}

export interface TestpmdOptions extends TestpmdPlace {
  /** Unique among those in the directory. */
  readonly name: string;
  /** Devices: what comes from the first goes to the second and back, and so with each two. */
  readonly devices: readonly string[];
  /** Words in front of the command: those of a network namespace, say. */
  readonly prefix?: readonly string[];
}

/** DPDK's forwarder of frames, which does as told. It dies with this process. */
export class Testpmd implements AsyncDisposable {
  private constructor(
    private readonly name: string,
    private readonly logPath: string,
    private readonly child: Bun.Subprocess<"pipe", number, number>,
  ) {}

  /** Resolves when it takes commands; it does not forward yet. @throws Error where there is no such program, or it ends */
  static async start(options: TestpmdOptions): Promise<Testpmd> {
    if (Bun.which(PROGRAM) === null) {
      throw new Error(
        `${PROGRAM} is not there, which frames are counted with: ./dev setup installs it (Debian: dpdk-dev)`,
      );
    }
    const { name, directory, cpu, otherCpu, devices, prefix = [] } = options;
    const command = [
      // Answers are buffered otherwise, the prompt behind them is not.
      ...["setpriv", "--pdeathsig", "KILL", ...prefix, "stdbuf", "-oL", PROGRAM, "-v"],
      ...["-l", `${otherCpu},${cpu}`, "--main-lcore", otherCpu, "--no-huge", "-m", `${MEMORY}`, "--no-pci"],
      ...["--no-telemetry", `--file-prefix=${name}`, ...devices.flatMap((device) => ["--vdev", device]), "--"],
      ...["-i", "--nb-cores=1", "--forward-mode=io", `--burst=${BURST}`, `--total-num-mbufs=${BUFFERS}`],
    ];
    const logPath = join(directory, `${name}.log`);
    const log = openSync(logPath, "w");
    const child = Bun.spawn(command, {
      stdin: "pipe",
      stdout: log,
      stderr: log,
      env: { ...process.env, RUNTIME_DIRECTORY: directory },
    });
    closeSync(log);
    const testpmd = new Testpmd(name, logPath, child);
    try {
      await testpmd.answer(0, Deadline.after(START_TIMEOUT, `start of ${name}`));
    } catch (error) {
      await testpmd[Symbol.asyncDispose]();
      throw error;
    }
    return testpmd;
  }

  /** As it calls itself: "DPDK 22.11.11". */
  get version(): string {
    return /RTE Version: '(.+)'/.exec(this.log)?.[1] ?? "DPDK";
  }

  /** @returns what it answers */
  async command(line: string): Promise<string> {
    const from = this.log.length;
    this.child.stdin.write(`${line}\n`);
    await this.child.stdin.flush();
    return await this.answer(from, Deadline.after(COMMAND_TIMEOUT, `"${line}" in ${this.name}`));
  }

  async [Symbol.asyncDispose](): Promise<void> {
    // Its interfaces and files go when it ends by itself.
    this.child.stdin.write("quit\n");
    await this.child.stdin.end();
    try {
      await Deadline.after(END_TIMEOUT, `end of ${this.name}`).race(this.child.exited);
    } catch {
      this.child.kill("SIGKILL");
      await this.child.exited;
    }
  }

  private get log(): string {
    return readFileSync(this.logPath, "latin1");
  }

  /** What it writes from there on until it can be asked again. */
  private async answer(from: number, deadline: Deadline): Promise<string> {
    return await deadline.poll(() => {
      const text = this.log.slice(from);
      const end = text.lastIndexOf(PROMPT);
      if (end >= 0) return text.slice(0, end);
      if (this.child.exitCode === null && this.child.signalCode === null) return undefined;
      throw new Error(`${this.name} ended:\n${this.log.slice(-2000)}`);
    }, 5);
  }
}
