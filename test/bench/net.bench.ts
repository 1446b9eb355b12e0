import { mkdir, mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { NetworkNamespace } from "../kit/network-namespace.ts";
import { type Benchmark, type Figure, figure } from "./kit.ts";
import { type BackendOptions, startOurs, startPeer } from "./net-backends.ts";
import { NetLoop } from "./net-loop.ts";

const RUNS = 5;

/** What is compared over each way, by the first part of its figures' keys; sizes of frames in bytes. */
const COMPARISONS = {
  wire: [
    { key: "net.wire64", size: 64 },
    { key: "net.wire1500", size: 1500 },
  ],
  tap: [{ key: "net.tap", size: 64 }],
} as const;

/**
 * Frames per second that go round through two devices, of vhostd and softvf and of DPDK's own back-end: over a wire, and
 * over TAPs in a bridge. The front-end is DPDK's in both cases, and has a CPU, the back-end has another one.
 */
export default {
  name: "net",
  async run() {
    const [cpu, otherCpu] = await twoCpus();
    const directory = await mkdtemp(join(tmpdir(), "bench-net-"));
    try {
      await using namespace = await NetworkNamespace.create(directory);
      const options = { namespace, cpu, otherCpu };
      const figures: Figure[] = [];
      for (const way of ["wire", "tap"] as const) {
        figures.push(...(await compare({ ...options, way, directory: join(directory, way) })));
      }
      return figures;
    } finally {
      await rm(directory, { recursive: true });
    }
  },
} satisfies Benchmark;

async function compare(options: BackendOptions): Promise<Figure[]> {
  await mkdir(options.directory);
  await using undo = new AsyncDisposableStack();
  const peer = undo.use(await startPeer({ ...options, directory: join(options.directory, "peer") }));
  const ours = undo.use(await startOurs({ ...options, directory: join(options.directory, "ours") }));
  const theirLoop = undo.use(await NetLoop.start("peer-frontend", peer, options));
  const ourLoop = undo.use(await NetLoop.start("our-frontend", ours, options));
  const figures: Figure[] = [];
  for (const { key, size } of COMPARISONS[options.way]) {
    console.error(`${key}: ${ours.name} against ${peer.name}, frames of ${size} bytes`);
    const here: number[] = [];
    const there: number[] = [];
    for (let run = 0; run < RUNS; run++) {
      here.push(await ourLoop.run(size));
      there.push(await theirLoop.run(size));
    }
    const ratios = here.map((frames, run) => frames / there[run]!);
    figures.push(
      { ...figure(`${key}_ratio`, ratios, "ratio", { at: "least", value: 1 }), peer: peer.name },
      figure(`${key}_frames`, here, "1/s"),
      figure(`${key}_peer_frames`, there, "1/s"),
    );
  }
  return figures;
}

/** The last two of the CPUs that this process may use. @throws Error where there is only one */
async function twoCpus(): Promise<[string, string]> {
  const status = await Bun.file("/proc/self/status").text();
  const ranges = /^Cpus_allowed_list:\s*(.+)$/m.exec(status)?.[1]?.split(",") ?? [];
  const cpus = ranges.flatMap((range) => {
    const [first = 0, last = first] = range.split("-").map(Number);
    return Array.from({ length: last - first + 1 }, (_, index) => `${first + index}`);
  });
  const [other, own] = cpus.slice(-2);
  if (other === undefined || own === undefined) throw new Error("front-end and back-end need a CPU each: there is one");
  return [own, other];
}
