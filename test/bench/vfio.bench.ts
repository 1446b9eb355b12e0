/** What the daemon adds to kernel VFIO, and what one VM's memory costs another's session. */
import { join } from "node:path";
import { ROOT } from "../../tools/command.ts";
import { MachineRun } from "../kit/machine/machine-run.ts";
import { type Benchmark, type Figure, figure } from "./kit.ts";
import { buildProgram } from "./native.ts";
import { slowMapping } from "./slow-mapping.ts";
import type { AttachTimes } from "./vfio-attach.ts";

/** Milliseconds. */
const MACHINE_TIMEOUT = 300_000;

export default {
  name: "vfio",
  run: async (): Promise<Figure[]> => {
    const { bare, daemon } = await attachTimes();
    const ratios = daemon.map((time, run) => time / bare[run]!);
    return [
      figure("vfio.attach_ratio", ratios, "ratio", { at: "most", value: 1.2 }),
      figure("vfio.attach_ms", daemon, "ms"),
      figure("vfio.bare_open_ms", bare, "ms"),
      figure("vfio.slow_map_other_vf_ms", await slowMapping(), "ms", { at: "most", value: 10 }),
    ];
  },
} satisfies Benchmark;

/** Measured in the machine of the vfio tests. */
async function attachTimes(): Promise<AttachTimes> {
  const program = await buildProgram("vfio-open");
  const words = [process.execPath, join(import.meta.dir, "vfio-attach.ts"), program];
  await using machine = await MachineRun.start({ kernel: "6.12", sriov: false }, { words, directory: ROOT });
  let output = "";
  const code = await machine.finished(MACHINE_TIMEOUT, (text) => {
    output += text;
  });
  if (code !== 0) throw new Error(`measuring in the machine ended with ${code}:\n${output}`);
  return JSON.parse(output.trimEnd().split("\n").at(-1) ?? "") as AttachTimes;
}
