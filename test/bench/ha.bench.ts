/** How quickly another daemon goes on where one has died, and what it costs to be able to. */
import { BusyMachine } from "./ha-adoption.ts";
import { gapRatios } from "./ha-gap.ts";
import { keeperMemory } from "./ha-keeper-memory.ts";
import { keeperCosts } from "./ha-write-through.ts";
import { install } from "./installed.ts";
import { type Benchmark, type Figure, figure } from "./kit.ts";

const RUNS = 9;
const VFS = 256;
/** A network card for a VM with many processors has that many. */
const MANY_QUEUES = 256;
const KEEPERS = 5;
/** Milliseconds for the machine to come to rest after an adoption. */
const REST = 300;

export default {
  name: "ha",
  run: async (): Promise<Figure[]> => {
    await install();
    return [...(await adoption()), ...(await writeThrough()), ...(await gaps()), ...(await memory())];
  },
} satisfies Benchmark;

async function adoption(): Promise<Figure[]> {
  console.error("adoption");
  const one: number[] = [];
  const all: number[] = [];
  const waiting: number[] = [];
  {
    await using machine = await BusyMachine.start(1);
    await repeat(async () => one.push(await machine.adoptAll()));
  }
  {
    await using machine = await BusyMachine.start(VFS);
    await repeat(async () => all.push(await machine.adoptAll()));
    await repeat(async () => waiting.push(await machine.answerOne()));
  }
  return [
    figure("ha.adopt_1_ms", one, "ms", { at: "most", value: 300 }),
    figure("ha.adopt_256_ms", all, "ms", { at: "most", value: 1500 }),
    figure("ha.first_waiting_of_256_ms", waiting, "ms", { at: "most", value: 300 }),
  ];
}

async function repeat(run: () => Promise<unknown>): Promise<void> {
  for (let at = 0; at < RUNS; at++) {
    await run();
    await Bun.sleep(REST);
  }
}

async function writeThrough(): Promise<Figure[]> {
  console.error("write-through");
  const few = await keeperCosts(4);
  const many = await keeperCosts(MANY_QUEUES);
  return [
    figure("ha.write_through_p50_us", few.fd, "µs", { at: "most", value: 150 }),
    figure("ha.write_through_256_queues_p50_us", many.fd, "µs"),
    figure("ha.write_through_whole_p50_us", few.whole, "µs", { at: "most", value: 150 }),
    figure("ha.write_through_whole_256_queues_p50_us", many.whole, "µs"),
    figure("ha.question_p50_us", few.asking, "µs"),
  ];
}

async function gaps(): Promise<Figure[]> {
  console.error("gaps");
  return [figure("ha.gap_ratio", await gapRatios(), "ratio", { at: "most", value: 1.2 })];
}

async function memory(): Promise<Figure[]> {
  console.error("memory of the keeper");
  const samples: number[] = [];
  for (let run = 0; run < KEEPERS; run++) samples.push(await keeperMemory());
  return [figure("ha.keeper_private_mib", samples, "MiB", { at: "most", value: 16 })];
}
