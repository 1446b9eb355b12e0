import { Deadline } from "../base/deadline.ts";
import { asError } from "../base/errors.ts";
import type { Logger } from "../base/log.ts";
import type { PciFunction, QueueStats } from "../pci/function.ts";

/**
 * What the queues of a function have done.
 * @param time for the answer, milliseconds
 * @returns null where the function does not count, or does not say so in time
 */
async function askQueueStats(fn: PciFunction, time: number, log: Logger): Promise<readonly QueueStats[] | null> {
  if (fn.queueStats === undefined) return null;
  try {
    return await Deadline.after(time, `the counters of ${fn.address}`).race(fn.queueStats());
  } catch (error) {
    log.warn("the function does not say what its queues have done", asError(error));
    return null;
  }
}

/**
 * What the queues of a VF's guest have done. Its configuration is read, too: where no driver runs it, it tells nobody of changes.
 * @param time for the answers, milliseconds
 * @returns null as askQueueStats
 */
export async function queueStatsOf(
  fn: PciFunction,
  target: { readonly queues: number; readConfig(): Promise<unknown> },
  time: number,
  log: Logger,
): Promise<readonly QueueStats[] | null> {
  const config = Deadline.after(time, `the configuration of ${fn.address}`).race(target.readConfig());
  const [all] = await Promise.all([askQueueStats(fn, time, log), config.catch(() => {})]);
  return all?.slice(0, target.queues) ?? null;
}
