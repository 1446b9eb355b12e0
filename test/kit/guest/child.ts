import { closeSync, openSync, readFileSync } from "node:fs";
import { Deadline } from "../../../src/base/deadline.ts";

export interface ChildOptions {
  /** What the process is called in errors. */
  readonly name: string;
  /** Takes standard output and standard error. */
  readonly log: string;
  readonly environment?: Readonly<Record<string, string>>;
  /** It is a program that is typed to (`type`); without this its standard input is empty. */
  readonly interactive?: boolean;
  /** Files that it has as 3 and the following. Borrowed for the call. */
  readonly fds?: readonly number[];
}

/**
 * A process of a test. It dies with the process that started it (PR_SET_PDEATHSIG), whatever way that one goes, so an
 * aborted test leaves nothing behind.
 */
export class Child implements AsyncDisposable {
  readonly name: string;
  private readonly process: Bun.Subprocess;
  private readonly logPath: string;

  constructor(command: readonly string[], options: ChildOptions) {
    this.name = options.name;
    this.logPath = options.log;
    const log = openSync(options.log, "a");
    this.process = Bun.spawn(["setpriv", "--pdeathsig", "KILL", ...command], {
      stdio: [options.interactive ? "pipe" : "ignore", log, log, ...(options.fds ?? [])],
      env: { ...process.env, ...options.environment },
    });
    closeSync(log);
  }

  get pid(): number {
    return this.process.pid;
  }

  /** The exit code, or the name of the signal that ended it. */
  readonly exited: Promise<number | string> = Promise.resolve().then(async () => {
    await this.process.exited;
    return this.process.signalCode ?? this.process.exitCode ?? "unknown";
  });

  get running(): boolean {
    return this.process.exitCode === null && this.process.signalCode === null;
  }

  /** All that it has written. */
  get log(): string {
    return readFileSync(this.logPath, "utf8");
  }

  /** Waits for a line of its output. @throws Error when it ends first, VhostdError timedOut */
  async line(pattern: RegExp, timeout: number): Promise<RegExpMatchArray> {
    const deadline = Deadline.after(timeout, `"${pattern.source}" in the output of ${this.name}`);
    return deadline.poll(() => {
      const found = this.log.match(pattern);
      if (found) return found;
      if (!this.running) throw new Error(`${this.name} ended:\n${this.tail()}`);
      return undefined;
    }, 10);
  }

  /** The last lines of its output. */
  tail(lines = 20): string {
    return this.log.trimEnd().split("\n").slice(-lines).join("\n");
  }

  /** Types a line to an interactive program. */
  type(line: string): void {
    const { stdin } = this.process;
    if (stdin === undefined || typeof stdin === "number") throw new Error(`${this.name} has no standard input`);
    stdin.write(`${line}\n`);
    stdin.flush();
  }

  signal(signal: NodeJS.Signals): void {
    this.process.kill(signal);
  }

  /** SIGKILL, and waits until it is gone. */
  async kill(): Promise<void> {
    this.process.kill("SIGKILL");
    await this.process.exited;
  }

  /** SIGTERM, and SIGKILL for one that does not listen. */
  async [Symbol.asyncDispose](): Promise<void> {
    this.process.kill("SIGTERM");
    try {
      await Deadline.after(5_000, `end of ${this.name}`).race(this.process.exited);
    } catch {
      await this.kill();
    }
  }
}
