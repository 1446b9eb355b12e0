import { Deadline } from "../base/deadline.ts";
import { asError } from "../base/errors.ts";
import type { Logger } from "../base/log.ts";
import type { PciFunction, QueueStats } from "../pci/function.ts";

/**
 * What the queues of a function have done.
 * @param time for the answer, milliseconds
 * @returns null where the function does not count, or does not say so in time
 */
export async function askQueueStats(fn: PciFunction, time: number, log: Logger): Promise<readonly QueueStats[] | null> {
  if (fn.queueStats === undefined) return null;
  try {
    return await Deadline.after(time, `the counters of ${fn.address}`).race(fn.queueStats());
  } catch (error) {
    log.warn("the function does not say what its queues have done", asError(error));
    return null;
  }
}
