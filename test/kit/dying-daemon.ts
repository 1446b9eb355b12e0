import { writeSync } from "node:fs";
import { runDaemon } from "../../src/daemon/main.ts";
import { c } from "../../src/native/load.ts";

/**
 * The daemon, with a moment to die: once SIGUSR2 has come, it kills itself before it tells anybody anything, or takes
 * anything from a socket, for the Nth time (VFE_DIE_AT). These are the moments that matter: between two of them nobody can
 * tell whether it lives. A second SIGUSR2 has it say how many there were.
 */

/** By which it does something that others can notice, or that cannot be done twice. */
const STEPS = ["vhostd_send", "vhostd_receive", "vhostd_pwrite", "vhostd_signal_eventfd"] as const;

const dieAt = Number(process.env["VFE_DIE_AT"] ?? 0);
let armed = false;
let steps = 0;

function step(): void {
  if (!armed || ++steps !== dieAt) return;
  process.kill(process.pid, "SIGKILL");
}

const calls = c as unknown as Record<string, (...values: unknown[]) => unknown>;
for (const name of STEPS) {
  const call = calls[name];
  if (call === undefined) throw new Error(`there is no ${name}`);
  calls[name] = (...values) => {
    step();
    return call(...values);
  };
}
process.on("SIGUSR2", () => {
  armed = !armed;
  writeSync(1, armed ? "armed\n" : `steps ${steps}\n`);
});

process.exitCode = await runDaemon(process.argv.slice(2));
