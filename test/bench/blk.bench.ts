import { mkdtemp, rm } from "node:fs/promises";
import { join } from "node:path";
import { Deadline } from "../../src/base/deadline.ts";
import { Child } from "../kit/guest/child.ts";
import { Stack } from "../kit/guest/stack.ts";
import { BlkLoad, makeDisk } from "./blk-load.ts";
import { type Benchmark, type Figure, figure } from "./kit.ts";
import { benchCpu, buildProgram, output } from "./native.ts";

/** Requests under way, and how often as many as qemu-storage-daemon are wanted. */
const DEPTHS = [
  { depth: 1, least: 1 },
  { depth: 32, least: 2 },
] as const;
const RUNS = 7;
const TMPFS = "/dev/shm";
const TIMEOUT = 15_000;

/**
 * Random reads of 4 KiB through vhostd and vfe-softvf, and through qemu-storage-daemon, of the same file on tmpfs: the
 * same front-end, and everything on one CPU, because across two the figures jump between levels.
 */
export default {
  name: "blk",
  async run() {
    const directory = await mkdtemp(join(TMPFS, "bench-blk-"));
    try {
      return await compare(directory);
    } finally {
      await rm(directory, { recursive: true });
    }
  },
} satisfies Benchmark;

async function compare(directory: string): Promise<Figure[]> {
  const [program, cpu] = [await buildProgram("blk-load"), await benchCpu()];
  const disk = join(directory, "disk");
  await makeDisk(disk);
  await using ours = await Stack.start({ directory, disk, queues: 1 });
  await ours.startDaemon();
  await ours.addVf(join(directory, "vhostd.sock"), "--server");
  await using theirs = await startStorageDaemon(directory, disk);
  for (const { pid } of [ours.softvf, ours.daemon, theirs]) await output(["taskset", "-acp", cpu, `${pid}`]);
  using here = await BlkLoad.connect(join(directory, "vhostd.sock"));
  using there = await BlkLoad.connect(join(directory, "qemu.sock"));
  const figures: Figure[] = [];
  for (const { depth, least } of DEPTHS) {
    const runs: { readonly ours: number; readonly theirs: number }[] = [];
    const run = async (load: BlkLoad) => (await load.run(["taskset", "-c", cpu, program], depth)).rate;
    for (let round = 0; round < RUNS; round++) runs.push({ ours: await run(here), theirs: await run(there) });
    const column = (of: (run: (typeof runs)[number]) => number) => runs.map(of);
    const ratios = column((run) => run.ours / run.theirs);
    figures.push(
      figure(`blk.qd${depth}_ratio`, ratios, "ratio", { at: "least", value: least }),
      figure(
        `blk.qd${depth}_requests`,
        column((run) => run.ours),
        "1/s",
      ),
      figure(
        `blk.qd${depth}_qemu_requests`,
        column((run) => run.theirs),
        "1/s",
      ),
    );
  }
  return figures;
}

async function startStorageDaemon(directory: string, disk: string): Promise<Child> {
  const socket = join(directory, "qemu.sock");
  const listens = join(directory, "qemu.pid");
  const child = new Child(
    [
      ...["qemu-storage-daemon", "--pidfile", listens, "--blockdev", `driver=file,node-name=disk,filename=${disk}`],
      ...["--export", `type=vhost-user-blk,id=export,node-name=disk,writable=on,addr.type=unix,addr.path=${socket}`],
    ],
    { name: "qemu-storage-daemon", log: join(directory, "qemu.log") },
  );
  await Deadline.after(TIMEOUT, "qemu-storage-daemon").poll(async () => {
    if (!child.running) throw new Error(`qemu-storage-daemon ended: ${child.tail()}`);
    return (await Bun.file(listens).exists()) || undefined;
  }, 10);
  return child;
}
