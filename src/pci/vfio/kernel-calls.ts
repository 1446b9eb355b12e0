import type { Deadline } from "../../base/deadline.ts";

/**
 * Calls into the kernel that may outlive the patience of whoever made them: nothing can cancel an ioctl. What such a call
 * brings when nobody waits for it any more is undone, and who comes next can wait until that is so.
 */
export class KernelCalls {
  private readonly underWay = new Set<Promise<unknown>>();

  /**
   * Makes a call and waits for it until the deadline.
   * @param late takes what the call brings after that, and undoes it; it does not throw
   * @throws as the call does; VhostdError timedOut
   */
  async run<T>(deadline: Deadline, call: () => Promise<T>, late: (result: T) => void | Promise<void>): Promise<T> {
    deadline.check();
    let result: { readonly value: T } | undefined;
    let abandoned = false;
    const arrived = call().then(async (value) => {
      if (abandoned) await late(value);
      else result = { value };
    });
    this.track(arrived);
    try {
      await deadline.race(arrived);
    } catch (error) {
      // It may have arrived in the moment in which the deadline passed.
      if (result === undefined) {
        abandoned = true;
        throw error;
      }
    }
    return result!.value;
  }

  /** Nobody waits for `work`, but those who call `idle`. */
  track(work: Promise<unknown>): void {
    const settled = work
      .catch(() => {})
      .finally(() => {
        this.underWay.delete(settled);
      });
    this.underWay.add(settled);
  }

  /** Until nothing is under way. */
  async idle(): Promise<void> {
    while (this.underWay.size > 0) await Promise.all(this.underWay);
  }
}
