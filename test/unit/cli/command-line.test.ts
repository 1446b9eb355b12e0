import { describe, expect, test } from "bun:test";
import {
  type CommandLine,
  formatHelp,
  HelpRequest,
  type Option,
  parseCommandLine,
  UsageError,
} from "../../../src/command-line.ts";

const OPTIONS = {
  add: { type: "boolean", short: "a", exclusive: true, help: "add it" },
  list: { type: "boolean", short: "l", exclusive: true, help: "list it" },
  bus: { type: "string", multiple: true, value: "DIR", help: "a bus" },
  socket: { type: "string", short: "v", value: "PATH", help: "a socket" },
} as const satisfies Record<string, Option>;

const LINE: CommandLine<typeof OPTIONS> = {
  name: "prog",
  summary: "Does it.",
  options: OPTIONS,
  positionals: [{ name: "DEVICE", help: "which" }],
};

test("options in any order, repeated, attached to their letter", () => {
  const { values, positionals } = parseCommandLine(LINE, ["5a:00.1", "--bus", "/a", "-v/tmp/s", "--bus=/b", "-a"]);
  expect({ ...values }).toEqual({ add: true, bus: ["/a", "/b"], socket: "/tmp/s" });
  expect(positionals).toEqual(["5a:00.1"]);
});

test("a last argument that may be given several times", () => {
  const line = { ...LINE, positionals: [{ name: "DEVICE", help: "which", multiple: true }] };
  expect(parseCommandLine(line, ["a", "-l", "b", "c"]).positionals).toEqual(["a", "b", "c"]);
  expect(formatHelp(line)).toContain(" [DEVICE]…\n");
});

describe("a usage error", () => {
  for (const [args, message] of [
    [["--nope"], "Unknown option '--nope'"],
    [["-z"], "Unknown option '-z'"],
    [["--socket"], "argument missing"],
    [["--add=yes"], "does not take an argument"],
    [["a", "b"], 'unexpected argument "b"'],
  ] as const) {
    test(args.join(" "), () => {
      expect(() => parseCommandLine(LINE, args)).toThrow(UsageError);
      expect(() => parseCommandLine(LINE, args)).toThrow(message);
    });
  }
});

test("help shows every option and which exclude each other", () => {
  expect(() => parseCommandLine(LINE, ["-a", "--help"])).toThrow(HelpRequest);
  const help = formatHelp(LINE);
  expect(help).toStartWith("usage: prog [-h] [-a | -l] [--bus DIR]… [-v PATH] [DEVICE]\n");
  for (const text of ["-a, --add", "--bus DIR", "-v, --socket PATH", "-h, --help", "DEVICE", "Does it."]) {
    expect(help).toContain(text);
  }
});
