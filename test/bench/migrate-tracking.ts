import { mkdtemp, rm } from "node:fs/promises";
import { join } from "node:path";
import { FrontendDirtyLog } from "../kit/frontend/dirty-log.ts";
import type { VhostUserFrontend } from "../kit/frontend/frontend.ts";
import { startLogging, stopLogging } from "../kit/frontend/migration-messages.ts";
import { Stack, type StackOptions } from "../kit/guest/stack.ts";
import { BlkLoad, makeDisk } from "./blk-load.ts";
import { type Figure, figure } from "./kit.ts";
import { benchCpu, buildProgram, output } from "./native.ts";
import { NetLoad } from "./net-load.ts";

const RUNS = 11;
const TMPFS = "/dev/shm";
const DEPTH = 32;
/** Milliseconds between two passes over the log, which clears it. */
const PASS_INTERVAL = 100;
const TARGET = { at: "least", value: 0.9 } as const;

/** A front-end, and what its guest gets done per second. */
interface Load {
  readonly frontend: VhostUserFrontend;
  run(): Promise<number>;
}

/**
 * What a guest gets done while the device marks the pages that it writes, and the VMM looks into the log again and again,
 * as a part of what it gets done otherwise: one after the other in the same session, all on one CPU.
 */
export async function trackingFigures(): Promise<Figure[]> {
  const cpu = await benchCpu();
  const [blk, net] = [await buildProgram("blk-load"), await buildProgram("net-load")];
  const command = (program: string) => ["taskset", "-c", cpu, program];
  console.error("migrate.tracking_throughput: reads of 4 KiB, 32 at once; then frames of 1500 bytes that come back");
  const requests = await onStack(cpu, {}, async (socket) => {
    using load = await BlkLoad.connect(socket);
    return await compare({ frontend: load.frontend, run: async () => (await load.run(command(blk), DEPTH)).rate });
  });
  const frames = await onStack(cpu, { deviceClass: "net", softvf: ["--backend", "echo"] }, async (socket) => {
    using load = await NetLoad.connect(socket);
    return await compare({ frontend: load.frontend, run: () => load.run(command(net)) });
  });
  return [
    figure("migrate.tracking_throughput_ratio", requests.ratios, "ratio", TARGET),
    figure("migrate.untracked_requests", requests.untracked, "1/s"),
    figure("migrate.net_tracking_throughput_ratio", frames.ratios, "ratio", TARGET),
    figure("migrate.net_untracked_frames", frames.untracked, "1/s"),
  ];
}

async function onStack<T>(
  cpu: string,
  options: Omit<StackOptions, "directory">,
  work: (socket: string) => Promise<T>,
): Promise<T> {
  const directory = await mkdtemp(join(TMPFS, "bench-tracking-"));
  try {
    const disk = options.deviceClass === undefined ? { disk: join(directory, "disk") } : {};
    if (disk.disk !== undefined) await makeDisk(disk.disk);
    await using stack = await Stack.start({ directory, queues: 1, ...disk, ...options });
    await stack.startDaemon();
    const socket = join(directory, "vhostd.sock");
    await stack.addVf(socket, "--server");
    for (const { pid } of [stack.softvf, stack.daemon]) await output(["taskset", "-acp", cpu, `${pid}`]);
    return await work(socket);
  } finally {
    await rm(directory, { recursive: true });
  }
}

/** Each run with is between two without, whose mean it is held against: a machine that changes its pace changes both. */
async function compare({ frontend, run }: Load): Promise<{ ratios: number[]; untracked: number[] }> {
  using log = new FrontendDirtyLog(frontend.memory.end);
  const untracked = [await run()];
  const ratios: number[] = [];
  for (let at = 0; at < RUNS; at++) {
    await startLogging(frontend, log);
    let marked = 0;
    const pass = () => (marked += log.take().length);
    const passes = setInterval(pass, PASS_INTERVAL);
    const tracked = await run();
    clearInterval(passes);
    pass();
    if (marked === 0) throw new Error("no page was marked");
    await stopLogging(frontend);
    untracked.push(await run());
    ratios.push((2 * tracked) / (untracked.at(-1)! + untracked.at(-2)!));
  }
  return { ratios, untracked };
}
