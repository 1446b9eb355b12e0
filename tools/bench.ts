import { readdir } from "node:fs/promises";
import { join } from "node:path";
import { type Figure, isMet } from "../test/bench/kit.ts";
import { defineTask, ROOT, UsageError } from "./command.ts";
import { prepare } from "./preparation.ts";

const FOLDER = join(ROOT, "test/bench");
const SUFFIX = ".bench.ts";
/** Milliseconds after which a group is ended. */
const GROUP_TIMEOUT = 600_000;
const STANDARD_ERROR = 2;

export default defineTask({
  name: "bench",
  description: "Measure; each figure is the median of several runs, with the lowest and the highest",
  args: {
    json: { type: "boolean", description: "One JSON object on standard output instead of the table" },
    names: { type: "positional", required: false, description: "Groups to measure; all unless given" },
  },
  run: async ({ json, _: names }) => {
    const groups = (await readdir(FOLDER))
      .filter((file) => file.endsWith(SUFFIX))
      .map((file) => file.slice(0, -SUFFIX.length))
      .sort();
    const unknown = names.find((name) => !groups.includes(name));
    if (unknown !== undefined) {
      throw new UsageError(`no benchmark is called "${unknown}"; there are: ${groups.join(", ")}`);
    }
    await prepare("native");
    const figures: Figure[] = [];
    const failed: string[] = [];
    for (const group of groups.filter((name) => names.length === 0 || names.includes(name))) {
      console.error(`measuring ${group}`);
      const measured = await measure(group);
      if (measured === undefined) failed.push(group);
      else figures.push(...measured);
    }
    console.log(json === true ? JSON.stringify(toObject(figures)) : formatTable(figures));
    for (const group of failed) console.error(`dev: the benchmark ${group} failed`);
    return failed.length === 0 ? 0 : 1;
  },
});

/** Runs a group in a process of its own, whose output goes to standard error. @returns undefined where it failed */
async function measure(group: string): Promise<readonly Figure[] | undefined> {
  let figures: readonly Figure[] | undefined;
  const child = Bun.spawn([process.execPath, join(FOLDER, "run-group.ts"), join(FOLDER, group + SUFFIX)], {
    stdio: ["ignore", STANDARD_ERROR, STANDARD_ERROR],
    timeout: GROUP_TIMEOUT,
    serialization: "json",
    ipc: (message) => {
      figures = message as readonly Figure[];
    },
  });
  return (await child.exited) === 0 ? figures : undefined;
}

/** For programs: the figures by their keys; `met` says whether the target is kept. */
export function toObject(figures: readonly Figure[]): Record<string, unknown> {
  return Object.fromEntries(
    figures.map((figure) => {
      const { key, ...rest } = figure;
      const met = isMet(figure);
      return [key, met === undefined ? rest : { ...rest, met }];
    }),
  );
}

/** For people: one line a figure. */
export function formatTable(figures: readonly Figure[]): string {
  const header = ["figure", "median", "min", "max", "unit", "target", "", ""];
  const rows = figures.map((figure) => [
    figure.key,
    ...[figure.value, figure.min, figure.max].map(readable),
    figure.unit,
    figure.target === undefined ? "" : `${figure.target.at === "most" ? "≤" : "≥"} ${figure.target.value}`,
    { true: "met", false: "NOT MET", undefined: "" }[`${isMet(figure)}`],
    figure.peer === undefined ? "" : `peer: ${figure.peer}`,
  ]);
  const all = [header, ...rows];
  const widths = header.map((_, column) => Math.max(...all.map((row) => row[column]!.length)));
  const isNumber = (column: number) => column >= 1 && column <= 3;
  return all
    .map((row) =>
      row
        .map((cell, column) => (isNumber(column) ? cell.padStart(widths[column]!) : cell.padEnd(widths[column]!)))
        .join("  ")
        .trimEnd(),
    )
    .join("\n");
}

/** Three digits are as much as such figures are worth. */
function readable(value: number): string {
  return Math.abs(value) >= 100 ? value.toFixed(0) : value.toPrecision(3);
}
