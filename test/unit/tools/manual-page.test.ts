import { expect, test } from "bun:test";
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { formatHelp } from "../../../src/command-line.ts";
import { manualPage } from "../../../tools/package/manual-page.ts";

test("a manual page has what the program and its commands say of themselves", async () => {
  const directory = await mkdtemp(join(tmpdir(), "manual-"));
  try {
    const own = formatHelp({
      name: "tool",
      summary: "Does things.",
      options: { "a-name": { type: "string", value: "VALUE", help: "what it is for" } },
      commands: [{ name: "run", help: "runs" }],
      notes: ".dots and \\ are text.",
    });
    const run = formatHelp({ name: "tool run", summary: "Runs.", options: {} });
    await writeFile(join(directory, "own"), own);
    await writeFile(join(directory, "run"), run);
    const script = `#!/bin/sh\ncase "$1" in run) cat ${directory}/run;; *) cat ${directory}/own;; esac\n`;
    await writeFile(join(directory, "tool"), script, { mode: 0o755 });
    const page = await manualPage(join(directory, "tool"), "tool", 8, "1.0");
    expect(page.split("\n")).toEqual([
      '.TH TOOL 8 "" "tool 1.0"',
      ".SH NAME",
      "tool \\- Does things",
      ".SH SYNOPSIS",
      "tool [\\-h] [\\-\\-a\\-name VALUE] COMMAND …",
      ".SH COMMANDS",
      ".TP",
      ".B run",
      "runs",
      ".SH OPTIONS",
      ".TP",
      ".B \\-\\-a\\-name VALUE",
      "what it is for",
      ".TP",
      ".B \\-h, \\-\\-help",
      "show this help",
      ".SH DESCRIPTION",
      "\\&.dots and \\e are text.",
      ".br",
      ".SH RUN",
      "tool run [\\-h]",
      ".PP",
      "Runs",
      ".SS options",
      ".TP",
      ".B \\-h, \\-\\-help",
      "show this help",
      ".SH SEE ALSO",
      "/usr/share/doc/vfe-vhostd",
      "",
    ]);
  } finally {
    await rm(directory, { recursive: true });
  }
});
