import type { Logger } from "../base/log.ts";

/** Lines of one session that a front-end can have written as often as it likes. */
const LINES_MAX = 32;

/** What a front-end says wrongly or too often is logged up to a limit: its pace must not be that of the log. */
export class BoundedLog {
  private lines = 0;

  constructor(private readonly log: Pick<Logger, "info" | "warn">) {}

  info(text: string): void {
    this.write("info", text);
  }

  warn(text: string): void {
    this.write("warn", text);
  }

  private write(level: "info" | "warn", text: string): void {
    this.lines++;
    if (this.lines < LINES_MAX) this.log[level](text);
    if (this.lines === LINES_MAX) this.log.warn(`${text}; no more such lines for this session`);
  }
}
