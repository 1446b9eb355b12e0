/** Characters that may wait for whoever reads a stream; further lines are counted, not kept. */
const BACKLOG_MAX = 1 << 20;

/** Of process.stderr, the part that is used. */
export interface LineStream {
  write(text: string, done: () => void): unknown;
}

/**
 * Lines on their way to a stream whose reader may be slow, stopped or gone. Neither is allowed to matter to the process:
 * writing returns at once, keeps a bounded amount, and what had to be dropped is said as soon as the reader goes on.
 */
export class LogOutput {
  private waiting = 0;
  private dropped = 0;

  /** @param dropNotice the line that says how many lines are missing */
  constructor(
    private readonly stream: LineStream,
    private readonly dropNotice: (lines: number) => string,
  ) {}

  write(line: string): void {
    if (this.waiting + line.length > BACKLOG_MAX) {
      this.dropped++;
      return;
    }
    this.waiting += line.length;
    this.stream.write(line, () => {
      this.waiting -= line.length;
      if (this.dropped === 0 || this.waiting > 0) return;
      const dropped = this.dropped;
      this.dropped = 0;
      this.write(this.dropNotice(dropped));
    });
  }
}

let surviving = false;

/** A reader of standard output or standard error that goes away ends no process that has work to do. */
export function surviveLostReaders(): void {
  if (surviving) return;
  surviving = true;
  for (const stream of [process.stdout, process.stderr]) stream.on("error", () => {});
}
