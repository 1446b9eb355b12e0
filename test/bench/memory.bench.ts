/** What the daemon keeps in memory for VFs that nobody uses, in the form that users install. */
import { InstalledMachine, install } from "./installed.ts";
import { type Benchmark, type Figure, figure } from "./kit.ts";

const RUNS = 5;
const VFS = 256;
const MIB = 2 ** 20;
const KIB = 2 ** 10;
/** Milliseconds until what was only needed for a moment has been given back. */
const SETTLING = 6_000;

export default {
  name: "memory",
  run: async (): Promise<Figure[]> => {
    await install();
    const one: number[] = [];
    const perVf: number[] = [];
    for (let run = 1; run <= RUNS; run++) {
      console.error(`${VFS} VFs, ${run} of ${RUNS}`);
      const { first, all } = await measure();
      one.push(first / MIB);
      perVf.push((all - first) / (VFS - 1) / KIB);
    }
    return [
      figure("memory.one_vf_rss_mib", one, "MiB", { at: "most", value: 80 }),
      figure("memory.per_idle_vf_kib", perVf, "KiB", { at: "most", value: 64 }),
    ];
  },
} satisfies Benchmark;

/** Resident bytes of a new daemon with its first VF, and with all. */
async function measure(): Promise<{ first: number; all: number }> {
  await using machine = await InstalledMachine.start(VFS);
  await machine.addVf(0, "client");
  await Bun.sleep(SETTLING);
  const first = await machine.residentMemory();
  for (let vf = 1; vf < VFS; vf++) await machine.addVf(vf, "client");
  await Bun.sleep(SETTLING);
  return { first, all: await machine.residentMemory() };
}
