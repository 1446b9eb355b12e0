import { mkdtemp, open, rm } from "node:fs/promises";
import { join } from "node:path";
import { Deadline } from "../../src/base/deadline.ts";
import { eventfd } from "../../src/native/sys.ts";
import { Request } from "../../src/vhost-user/messages.ts";
import { FeatureBit, featureBits } from "../../src/virtio/features.ts";
import { u64, VhostUserFrontend } from "../kit/frontend/frontend.ts";
import { Child } from "../kit/guest/child.ts";
import { Stack } from "../kit/guest/stack.ts";
import { type Benchmark, type Figure, figure } from "./kit.ts";
import { benchCpu, buildProgram, output } from "./native.ts";

/** Requests under way, and how often as many as qemu-storage-daemon are wanted. */
const DEPTHS = [
  { depth: 1, least: 1 },
  { depth: 32, least: 2 },
] as const;
const RUNS = 7;
const SECONDS = "0.5";
const TMPFS = "/dev/shm";
const BLOCK = 4096;
const BLOCKS = 16_384;
const GUEST = 0x1_0000_0000;
const MEMORY = 8 << 20;
const RING = 128;
const FEATURES = featureBits(
  FeatureBit.version1,
  FeatureBit.ringIndirectDesc,
  FeatureBit.ringEventIdx,
  FeatureBit.vhostUserProtocolFeatures,
);
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
  using here = await Load.connect(join(directory, "vhostd.sock"));
  using there = await Load.connect(join(directory, "qemu.sock"));
  const figures: Figure[] = [];
  for (const { depth, least } of DEPTHS) {
    const runs: { readonly ours: number; readonly theirs: number }[] = [];
    const run = (load: Load) => load.run(["taskset", "-c", cpu, program], depth);
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

/** Each block begins with its number: the load generator compares. */
async function makeDisk(path: string): Promise<void> {
  const bytes = new Uint8Array(BLOCKS * BLOCK).fill(0xa5);
  const view = new DataView(bytes.buffer);
  for (let block = 0; block < BLOCKS; block++) view.setBigUint64(block * BLOCK, BigInt(block), true);
  await using file = await open(path, "w");
  await file.writeFile(bytes);
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

/** A session with one queue, and the load generator on it. */
class Load implements Disposable {
  private readonly call = eventfd();

  private constructor(private readonly frontend: VhostUserFrontend) {}

  static async connect(socket: string): Promise<Load> {
    const frontend = VhostUserFrontend.connect(socket);
    await frontend.negotiate({ features: FEATURES });
    if (frontend.features !== FEATURES) throw new Error(`${socket} offers other features than those compared`);
    await frontend.setupMemory([{ gpa: GUEST, size: MEMORY }]);
    await frontend.startQueues(1, { size: RING });
    const load = new Load(frontend);
    // Not the queue's own, which JavaScript waits on.
    await frontend.command(Request.SET_VRING_CALL, u64(0n), [load.call.number]);
    return load;
  }

  /** @returns requests per second */
  async run(program: readonly string[], depth: number): Promise<number> {
    const [
      {
        kick,
        driver: { ring },
      },
    ] = this.frontend.queues as [VhostUserFrontend["queues"][number]];
    const [{ file }] = this.frontend.memory.regions as [VhostUserFrontend["memory"]["regions"][number]];
    const { desc, driver, device, arena } = ring;
    const words = [depth, SECONDS, BLOCKS, RING, GUEST, desc, driver, device, arena.start].map(String);
    return Number(await output([...program, ...words], [file.file.number, kick.number, this.call.number]));
  }

  [Symbol.dispose](): void {
    this.frontend[Symbol.dispose]();
    this.call[Symbol.dispose]();
  }
}
