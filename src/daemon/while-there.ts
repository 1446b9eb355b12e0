import type { Deadline } from "../base/deadline.ts";
import type { PciFunction } from "../pci/function.ts";

/**
 * Takes steps with a function that was opened just now. When it is lost their deadline passes at once: a kernel that
 * unplugs it waits until it is closed.
 * @param deadline of the steps, and of nothing after them
 * @throws why the function is lost; else as the steps do
 */
export async function whileThere<T>(fn: PciFunction, deadline: Deadline, steps: () => Promise<T>): Promise<T> {
  let lost: Error | undefined;
  void fn.lost.then((reason) => {
    lost = reason;
    deadline.shorten(0);
  });
  const done = await steps().catch((error) => {
    throw lost ?? error;
  });
  if (lost !== undefined) throw lost;
  return done;
}
