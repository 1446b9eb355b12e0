import { readdir, readFile } from "node:fs/promises";

/** The environment variable that marks every process of a test file's run, its descendants too. */
export const RUN_MARK = "VHOSTD_TEST_RUN";
/** Milliseconds in which the processes of a file that has ended must be gone. */
const GRACE = 1000;
/** Milliseconds within which a process that was forked has become its program. */
const EXEC_TIME = 20;

/** Ends the processes that still carry the mark `run`. @returns their names, for the report */
export async function endLeftoverProcesses(run: string): Promise<string[]> {
  const end = performance.now() + GRACE;
  // One that is just being started shows no environment for a moment: a look at once could miss it.
  await Bun.sleep(EXEC_TIME);
  let left = await marked(run);
  while (left.length > 0 && performance.now() < end) {
    await Bun.sleep(50);
    left = await marked(run);
  }
  for (const { pid } of left) {
    try {
      process.kill(pid, "SIGKILL");
    } catch {
      // It ended by itself in between.
    }
  }
  return left.map(({ pid, command }) => `process ${pid} still runs: ${command}`);
}

async function marked(run: string): Promise<{ pid: number; command: string }[]> {
  const found: { pid: number; command: string }[] = [];
  for (const entry of await readdir("/proc")) {
    if (!/^\d+$/.test(entry)) continue;
    try {
      const environment = await readFile(`/proc/${entry}/environ`, "latin1");
      if (!environment.includes(`${RUN_MARK}=${run}`)) continue;
      const command = (await readFile(`/proc/${entry}/cmdline`, "latin1")).replaceAll("\0", " ").trim();
      found.push({ pid: Number(entry), command: command.slice(0, 200) });
    } catch {
      // Gone meanwhile, or another user's.
    }
  }
  return found;
}
