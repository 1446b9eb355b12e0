import { expect, test } from "bun:test";
import { readdirSync, readFileSync } from "node:fs";
import { atLength } from "../kit/at-length.ts";
import { HaLab } from "../kit/ha-lab.ts";
import { VerifiedDisk } from "../kit/verified-disk.ts";

const KILLS = atLength(200, 20);
/** Kills after which heaps have the size that they need. */
const WARM_UP = atLength(20, 4);
/** Kills at the begin and at the end of the rest, whose medians are compared. */
const WINDOW = Math.floor((KILLS - WARM_UP) / 3);
/** Kills between the two medians. */
const DISTANCE = KILLS - WARM_UP - WINDOW;
/** Mappings come and go with heaps and threads; one that is left behind by each kill is more. */
const MAPS_GROWTH_MAX = DISTANCE * 0.8;
/** KiB: 8 a kill, and what a heap takes at once, which says something of many kills only. */
const MEMORY_GROWTH_MAX = 8 * DISTANCE + 2048;

interface Holdings {
  readonly fds: number;
  /** Files of shared memory that are mapped. */
  readonly memoryMaps: number;
  readonly maps: number;
  /** That no other process has, KiB. */
  readonly memory: number;
}

function holdings(pid: number): Holdings {
  const maps = readFileSync(`/proc/${pid}/maps`, "utf8").trimEnd().split("\n");
  const rollup = readFileSync(`/proc/${pid}/smaps_rollup`, "utf8");
  return {
    fds: readdirSync(`/proc/${pid}/fd`).length,
    memoryMaps: maps.filter((line) => line.includes("memfd:")).length,
    maps: maps.length,
    memory: Number(/^Private_Dirty:\s+(\d+) kB$/m.exec(rollup)?.[1]),
  };
}

function median(all: readonly Holdings[], what: keyof Holdings): number {
  return all.map((one) => one[what]).toSorted((a, b) => a - b)[Math.floor(all.length / 2)]!;
}

test(
  `the daemon is killed ${KILLS} times: nothing grows`,
  async () => {
    // As the keeper's unit says: what is garbage does not stay long.
    process.env["BUN_JSC_forceRAMSize"] = "33554432";
    await using lab = await HaLab.create({ queues: 2 });
    await lab.startDaemon();
    await lab.addPf();
    const { listener, frontend } = await lab.connect();
    using _ = listener;
    using _frontend = frontend;
    await frontend.negotiate();
    await frontend.setupMemory([{ gpa: 0, size: 16 << 20 }]);
    await frontend.startQueues(2);
    const disk = new VerifiedDisk();
    const load = disk.runOn(frontend.queues[0]!.driver, 4);
    const seen: Record<"keeper" | "daemon" | "softvf", Holdings>[] = [];
    for (let kill = 0; kill < KILLS; kill++) {
      await lab.replaceDaemon();
      await lab.takenUp();
      await load.progress(20);
      const { keeper, daemon, softvf } = lab;
      seen.push({
        keeper: holdings(keeper.pid),
        daemon: holdings(daemon.pid),
        softvf: holdings(softvf.pid),
      });
    }
    await load.stop();
    await disk.verifyAll(frontend.queues[0]!.driver);
    for (const program of ["keeper", "daemon", "softvf"] as const) {
      const own = seen.slice(WARM_UP).map((kill) => kill[program]);
      const [early, late] = [own.slice(0, WINDOW), own.slice(-WINDOW)];
      const growth = (what: keyof Holdings) => median(late, what) - median(early, what);
      expect([program, growth("fds"), growth("memoryMaps")]).toEqual([program, 0, 0]);
      expect(growth("maps")).toBeLessThan(MAPS_GROWTH_MAX);
      // That of a daemon which is new says little.
      if (program !== "daemon") expect(growth("memory")).toBeLessThan(MEMORY_GROWTH_MAX);
    }
  },
  KILLS * 6000,
);
