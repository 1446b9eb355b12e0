import { VhostdError } from "./errors.ts";

/**
 * A point in time that a wait must not pass. Deadlines are made once at the top of an operation and handed down,
 * so that the sum of the inner waits cannot exceed what the caller was promised.
 */
export class Deadline {
  /** Sets the timers of those that race anew. */
  private readonly racers = new Set<() => void>();
  private readonly earlier: { readonly deadline: Deadline; readonly by: number }[] = [];

  private constructor(
    private end: number,
    /** What is being waited for, as it appears in the error: "reset of 0000:5a:00.1". */
    readonly what: string,
    private total: number,
  ) {}

  /** @param milliseconds from now */
  static after(milliseconds: number, what: string): Deadline {
    return new Deadline(performance.now() + milliseconds, what, milliseconds);
  }

  /** Milliseconds left, never negative. */
  get remaining(): number {
    return Math.max(0, this.end - performance.now());
  }

  get expired(): boolean {
    return this.remaining === 0;
  }

  /** There is less time from now on, also for what waits already. @param milliseconds left at most */
  shorten(milliseconds: number): void {
    const less = this.remaining - milliseconds;
    if (less <= 0) return;
    this.end -= less;
    this.total -= less;
    for (const rearm of this.racers) rearm();
    for (const { deadline, by } of this.earlier) deadline.shorten(Math.max(0, this.remaining - by));
  }

  /** One that passes that many milliseconds before this, also when this is shortened. */
  before(milliseconds: number): Deadline {
    const deadline = new Deadline(this.end - milliseconds, this.what, this.total - milliseconds);
    this.earlier.push({ deadline, by: milliseconds });
    return deadline;
  }

  error(): VhostdError {
    return new VhostdError("timedOut", `${this.what} did not end within ${Math.round(this.total)} ms`);
  }

  /** @throws VhostdError timedOut */
  check(): void {
    if (this.expired) throw this.error();
  }

  /** Settles as `promise` does, or rejects when the deadline passes. The work behind `promise` is not cancelled. */
  async race<T>(promise: Promise<T>): Promise<T> {
    let timer: ReturnType<typeof setTimeout> | undefined;
    let arm = () => {};
    const passed = new Promise<never>((_, reject) => {
      arm = () => {
        clearTimeout(timer);
        timer = setTimeout(() => reject(this.error()), this.remaining);
      };
    });
    this.racers.add(arm);
    arm();
    try {
      return await Promise.race([promise, passed]);
    } finally {
      this.racers.delete(arm);
      clearTimeout(timer);
    }
  }

  /**
   * Asks `done` again and again, giving way to the event loop in between, until it answers something other than
   * undefined.
   * @param interval milliseconds between two questions
   * @throws VhostdError timedOut
   */
  async poll<T>(done: () => Promise<T | undefined> | T | undefined, interval: number): Promise<T> {
    for (;;) {
      const answer = await done();
      if (answer !== undefined) return answer;
      this.check();
      await Bun.sleep(Math.min(interval, this.remaining));
    }
  }
}
