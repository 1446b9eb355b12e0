import { type ConsolaInstance, createConsola, type LogType } from "consola/core";
import { sentence } from "./errors.ts";
import { LogOutput, surviveLostReaders } from "./log-output.ts";

/** Levels as the command line names them, with consola's numbers. */
export const LOG_LEVELS = { error: 0, warn: 1, info: 3, debug: 4, trace: 5 } as const;
export type LogLevel = keyof typeof LOG_LEVELS;

/** A logger that names its subject; `log.child("vf 0000:5a:00.1")` narrows it. */
export interface Logger {
  error(message: string, cause?: unknown): void;
  warn(message: string, cause?: unknown): void;
  info(message: string): void;
  debug(message: string): void;
  child(subject: string): Logger;
}

/** journald reads a line's priority from a leading `<n>` (sd-daemon(3)). */
const PRIORITY: Partial<Record<LogType, number>> = { fatal: 2, error: 3, warn: 4, info: 6, debug: 7, trace: 7 };

/**
 * The root logger of a process. Writes to standard error; with journald behind it each line carries its priority. From
 * here on the process survives the loss of whoever reads its standard streams.
 */
export function createLogger(level: LogLevel, journald = process.env["JOURNAL_STREAM"] !== undefined): Logger {
  surviveLostReaders();
  const begin = (type: LogType, date: Date) =>
    journald ? `<${PRIORITY[type] ?? 6}>` : `${date.toISOString()} ${type.padEnd(5)} `;
  const output = new LogOutput(
    { write: (text, done) => process.stderr.write(text, done) },
    (lines) => `${begin("warn", new Date())}${lines} lines are missing here: the reader of this log was too slow\n`,
  );
  const root = createConsola({
    level: LOG_LEVELS[level],
    reporters: [
      {
        log({ type, tag, args, date }) {
          const subject = tag === "" ? "" : `${tag}: `;
          output.write(`${begin(type, date)}${subject}${args.map(describe).join(" ")}\n`);
        },
      },
    ],
  });
  return new SubjectLogger(root, "");
}

/** All subjects write by one consola instance: an instance is some 100 objects, too much for each of many VFs. */
class SubjectLogger implements Logger {
  constructor(
    private readonly root: ConsolaInstance,
    private readonly subject: string,
  ) {}

  error(message: string, cause?: unknown): void {
    this.root.error(this.line(message, cause));
  }

  warn(message: string, cause?: unknown): void {
    this.root.warn(this.line(message, cause));
  }

  info(message: string): void {
    this.root.info(this.line(message));
  }

  debug(message: string): void {
    this.root.debug(this.line(message));
  }

  child(subject: string): Logger {
    return new SubjectLogger(this.root, this.subject === "" ? subject : `${this.subject} ${subject}`);
  }

  private line(message: string, cause?: unknown) {
    return { tag: this.subject, args: cause === undefined ? [message] : [`${message}:`, cause] };
  }
}

/** One line whatever was thrown: a peer's text must not forge log lines. */
function describe(value: unknown): string {
  const text = value instanceof Error ? causeChain(value) : String(value);
  // biome-ignore lint/suspicious/noControlCharactersInRegex: control characters are what is removed
  return text.replace(/[\u0000-\u001f\u007f]/g, " ");
}

function causeChain(error: Error): string {
  const cause = error.cause instanceof Error ? ` (${causeChain(error.cause)})` : "";
  return `${sentence(error)}${cause}`;
}

/** Says nothing; for tests and for libraries that are handed no logger. */
export const silentLogger: Logger = {
  error() {},
  warn() {},
  info() {},
  debug() {},
  child: () => silentLogger,
};
