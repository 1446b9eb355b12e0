import { BlkLoad, makeDisk } from "./blk-load.ts";
import { InstalledMachine } from "./installed.ts";
import { benchCpu, buildProgram, output } from "./native.ts";

const RUNS = 7;
/** Of a run. */
const SECONDS = 4;
const KILLS = 5;
const DEPTH = 4;
/** Milliseconds. */
const TIMEOUT = 30_000;

/**
 * The longest time without a completion in a run in which the daemon is killed and started again, by that of a run in which
 * it is not. Guest and software VF have one CPU, daemon and keeper the others: it is about what they wait for, not about who
 * computes.
 */
export async function gapRatios(): Promise<number[]> {
  const [program, cpu] = [await buildProgram("blk-load"), await benchCpu()];
  await using machine = await InstalledMachine.start(1, { queues: 1, keeper: true, makeDisk });
  await machine.addVf(0, "server");
  using load = await BlkLoad.connect(machine.socket(0));
  await output(["taskset", "-acp", cpu, `${machine.softvf!.pid}`]);
  const others = await otherCpus(cpu);
  await output(["taskset", "-acp", others, `${machine.keeper!.pid}`]);
  const longest = async () => (await load.run(["taskset", "-c", cpu, program], DEPTH, SECONDS)).longestGap;
  const ratios: number[] = [];
  for (let run = 0; run < RUNS; run++) {
    const quiet = await longest();
    const disturbed = longest();
    await killSome(machine, others);
    ratios.push((await disturbed) / quiet);
  }
  return ratios;
}

async function killSome(machine: InstalledMachine, cpus: string): Promise<void> {
  for (let kill = 0; kill < KILLS; kill++) {
    await Bun.sleep((SECONDS * 1000 * (0.5 + Math.random())) / (KILLS + 1) / 2);
    await machine.daemon.kill();
    const daemon = machine.startDaemon();
    await output(["taskset", "-acp", cpus, `${daemon.pid}`]);
    await daemon.line(/ VFs of an earlier process go on$/m, TIMEOUT);
  }
}

/** All but one, as taskset wants them; that one where there is no other. */
async function otherCpus(cpu: string): Promise<string> {
  const all = navigator.hardwareConcurrency;
  const others = Array.from({ length: all }, (_, index) => `${index}`).filter((index) => index !== cpu);
  return others.length === 0 ? cpu : others.join(",");
}
