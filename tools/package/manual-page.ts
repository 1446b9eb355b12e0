import { runQuietly } from "../command.ts";

/** A section of a program's help: "options:" and its rows, or one that is only text. */
interface Section {
  readonly title?: string;
  readonly lines: readonly string[];
}

/** Name and explanation, as formatHelp (src/command-line.ts) sets them. */
const ROW = /^ {2}(.{28,}?) (\S.*)$/;

/**
 * The manual page of a program, made from what it says about itself: its own help and that of each of its commands.
 * @param program path of the executable
 * @param section of the manual
 * @returns roff
 */
export async function manualPage(program: string, name: string, section: number, version: string): Promise<string> {
  const own = await readHelp(program);
  const commands = own.sections.find(({ title }) => title === "commands")?.lines ?? [];
  const pages = [
    `.TH ${name.toUpperCase()} ${section} "" "${name} ${version}"`,
    ".SH NAME",
    `${roff(name)} \\- ${roff(own.summary)}`,
    ".SH SYNOPSIS",
    roff(own.usage),
    ...own.sections.flatMap((each) => [
      `.SH ${(each.title ?? "description").toUpperCase()}`,
      ...each.lines.flatMap(setLine),
    ]),
  ];
  for (const line of commands) {
    const command = ROW.exec(line)?.[1]?.trim();
    if (command === undefined) continue;
    const help = await readHelp(program, command);
    pages.push(`.SH ${roff(command.toUpperCase())}`, roff(help.usage), ".PP", roff(help.summary));
    for (const each of help.sections) {
      if (each.title !== undefined) pages.push(`.SS ${each.title}`);
      else pages.push(".PP");
      pages.push(...each.lines.flatMap(setLine));
    }
  }
  return `${[...pages, ".SH SEE ALSO", "/usr/share/doc/vfe-vhostd"].join("\n")}\n`;
}

async function readHelp(program: string, ...command: readonly string[]) {
  const [usage = "", summary = "", ...rest] = (await runQuietly([program, ...command, "--help"])).trim().split("\n\n");
  const sections = rest.map((text): Section => {
    const [first = "", ...lines] = text.split("\n");
    return /^\w+:$/.test(first) ? { title: first.slice(0, -1), lines } : { lines: [first, ...lines] };
  });
  return { usage: usage.replace("usage: ", ""), summary: summary.replace(/\.$/, ""), sections };
}

function setLine(line: string): string[] {
  const [, name, help] = ROW.exec(line) ?? [];
  return name === undefined || help === undefined
    ? [roff(line), ".br"]
    : [".TP", `.B ${roff(name.trim())}`, roff(help)];
}

/** A minus is not a hyphen, and a line of text is never a request. */
function roff(text: string): string {
  return text.replaceAll("\\", "\\e").replaceAll("-", "\\-").replace(/^[.']/, "\\&$&");
}
