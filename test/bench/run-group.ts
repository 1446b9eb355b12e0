/** Runs the benchmark in the file of the first argument and sends its figures to the process that started this one. */
import { basename } from "node:path";
import { stopNative } from "../../src/native/stop.ts";
import type { Benchmark } from "./kit.ts";

const [file = ""] = process.argv.slice(2);
const { default: benchmark } = (await import(file)) as { readonly default?: Benchmark };
if (benchmark === undefined || `${benchmark.name}.bench.ts` !== basename(file)) {
  throw new Error(`${file} exports no benchmark of its name by default`);
}
const figures = await benchmark.run();
await new Promise((sent) => process.send?.(figures, sent));
stopNative();
process.exit();
