/** What a migration costs, beside the time that the device takes. */
import { install } from "./installed.ts";
import { type Benchmark, type Figure, figure, type Target } from "./kit.ts";
import { BackAndForth } from "./migrate-blackout.ts";
import { trackingFigures } from "./migrate-tracking.ts";

/** Of each admin command, milliseconds: the daemon's own share is the same with all of them. */
const DELAYS = [0, 1, 10, 100] as const;
const SLOW = 100;
const RUNS = 9;
/** New daemons, for what they do for the first time. */
const NEW = 5;
/**
 * Sessions before anything is measured. Code is compiled as it is used, in four processes here, and each of them has every
 * other session only: figures fall until about here. What the first migration of a process takes is a figure of its own.
 */
const WARM_UP = 1000;

export default {
  name: "migrate",
  async run() {
    await install();
    return [
      ...(await byDelay("migrate.own_share_1vf", 1, 5)),
      ...(await byDelay("migrate.own_share_16vf", 16, 15)),
      await early(),
      await first(),
      ...(await trackingFigures()),
    ];
  },
} satisfies Benchmark;

/** The target is held against what is worst: the delay with the highest median. */
async function byDelay(key: string, vfs: number, most: number): Promise<Figure[]> {
  console.error(`${key}: a VM with VFs moves, ${vfs} at once, back and forth`);
  await using moves = await BackAndForth.start(vfs);
  for (let session = 0; session < WARM_UP; session += vfs) await moves.move(0);
  const samples = DELAYS.map(() => [] as number[]);
  for (let run = 0; run < RUNS; run++) {
    for (const [index, delay] of DELAYS.entries()) samples[index]!.push(await moves.move(delay));
  }
  const target: Target = { at: "most", value: most };
  const figures = DELAYS.map((delay, index) => figure(`${key}_delay${delay}_ms`, samples[index]!, "ms"));
  const worst = figures.toSorted((a, b) => b.value - a.value)[0]!;
  return [{ ...worst, key: `${key}_ms`, target }, ...figures];
}

/** The device is as slow as devices are, and was told most of it before the VM stopped. */
async function early(): Promise<Figure> {
  console.error("migrate.presetup_share: a VM moves to a VF that was set up early");
  await using moves = await BackAndForth.start(1, true);
  for (let session = 0; session < WARM_UP; session++) await moves.move(0);
  const samples: number[] = [];
  for (let run = 0; run < RUNS; run++) samples.push(await moves.move(SLOW));
  return figure("migrate.presetup_share_ms", samples, "ms", { at: "most", value: 3 });
}

/** The first migration of daemons that have just been started. */
async function first(): Promise<Figure> {
  console.error("migrate.first_own_share_1vf: new daemons, their first migration");
  const samples: number[] = [];
  for (let at = 0; at < NEW; at++) {
    await using moves = await BackAndForth.start(1);
    samples.push(await moves.move(0));
  }
  return figure("migrate.first_own_share_1vf_ms", samples, "ms");
}
