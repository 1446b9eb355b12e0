import { Deadline } from "../../../src/base/deadline.ts";

export interface CommandAnswer {
  readonly code: number;
  /** Standard output and standard error of everything that runs in the terminal, since the command was typed. */
  readonly output: string;
}

/** A bash that is typed into, one command after the other. Whatever was started from it ends with it. */
export class Terminal implements AsyncDisposable {
  private readonly bash: Bun.Subprocess<"pipe", "pipe", "ignore">;
  private readonly reading: Promise<void>;
  private text = "";
  private count = 0;

  constructor(directory: string) {
    this.bash = Bun.spawn(["bash", "--norc"], {
      cwd: directory,
      stdin: "pipe",
      stdout: "pipe",
      stderr: "ignore",
      // A process group of its own, which its background jobs belong to as well.
      detached: true,
    });
    this.bash.stdin.write("exec 2>&1\n");
    this.reading = this.read();
  }

  /** Everything that was written so far. */
  get output(): string {
    return this.text;
  }

  /** Types a command and waits until bash takes the next one. @throws Error when bash ends; VhostdError timedOut */
  async run(command: string, timeout = 60_000): Promise<CommandAnswer> {
    const start = this.text.length;
    const mark = `@@${this.count++}`;
    this.bash.stdin.write(`${command}\nprintf '\\n${mark} %d\\n' $?\n`);
    const end = new RegExp(`\\n${mark} (\\d+)\\n`);
    const found = await this.waitFor(end, `the end of "${command}"`, timeout, start);
    return { code: Number(found[1]), output: this.text.slice(start, start + found.index) };
  }

  /** Waits until `pattern` has been written behind the first `start` characters of the output. */
  async waitFor(pattern: RegExp, what: string, timeout: number, start = 0): Promise<RegExpExecArray> {
    return await Deadline.after(timeout, what).poll(() => {
      const found = pattern.exec(this.text.slice(start));
      if (found) return found;
      if (this.bash.exitCode !== null) throw new Error(`bash ended before ${what}:\n${this.text.slice(-2000)}`);
      return undefined;
    }, 10);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    try {
      process.kill(-this.bash.pid, "SIGKILL");
    } catch {
      // The whole group has ended.
    }
    await this.bash.exited;
    await this.reading;
  }

  private async read(): Promise<void> {
    const decoder = new TextDecoder();
    for await (const bytes of this.bash.stdout) this.text += decoder.decode(bytes, { stream: true });
  }
}
