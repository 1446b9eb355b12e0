import { Child } from "../guest/child.ts";
import { PROGRAM_ENVIRONMENT, programLine } from "./programs.ts";

/** Milliseconds, on a machine that is emulated. */
const START_TIMEOUT = 60_000;
const ORDER_TIMEOUT = 20_000;

/** What such a front-end has of the function when its session is over. */
export type Kept = "fd" | "mapping";

/**
 * A front-end as a process of its own, which was given doorbells, has used them, and keeps the function's file when its
 * session is over: its fd, or no more than the mapping of a doorbell.
 */
export class FormerFrontend implements AsyncDisposable {
  private constructor(private readonly child: Child) {}

  /**
   * Resolves when its guest has done some requests; its session goes on.
   * @param socket of a VF that listens
   * @param log a file for what it writes
   */
  static async start(socket: string, log: string, kept: Kept, queues: number): Promise<FormerFrontend> {
    const line = [...programLine("former-program"), socket, `${queues}`, kept];
    const child = new Child(line, {
      ...{ name: "former front-end", log, interactive: true },
      environment: PROGRAM_ENVIRONMENT,
    });
    try {
      await child.line(/^running$/m, START_TIMEOUT);
      return new FormerFrontend(child);
    } catch (error) {
      await child.kill();
      throw error;
    }
  }

  get pid(): number {
    return this.child.pid;
  }

  /** Closes its connection, and everything else of the session. */
  async endSession(): Promise<void> {
    await this.order("end session");
  }

  /** Resolves when the daemon has ended its session. */
  async hungUp(): Promise<void> {
    await this.child.line(/^hung up$/m, ORDER_TIMEOUT);
  }

  /** Lets the function read and write memory, by the fd. */
  async masterBus(): Promise<void> {
    await this.order("master bus");
  }

  /** Closes what it has kept; the process goes on. */
  async letGo(): Promise<void> {
    await this.order("let go");
  }

  /** kill -9. */
  async kill(): Promise<void> {
    await this.child.kill();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.kill();
  }

  /** To be given once. */
  private async order(words: string): Promise<void> {
    this.child.type(words);
    await this.child.line(new RegExp(`^done: ${words}$`, "m"), ORDER_TIMEOUT);
  }
}
