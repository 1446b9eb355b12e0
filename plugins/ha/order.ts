import type { WaitingVf } from "vfe-vhostd/plugin";

/**
 * A front-end that waits keeps a VM's main loop waiting, a person who asks can wait a little; the rest run all the while and
 * lack nothing.
 */
export function next(waiting: readonly WaitingVf[]): number {
  const first = waiting.findIndex(({ frontEndWaits }) => frontEndWaits);
  return first >= 0
    ? first
    : Math.max(
        0,
        waiting.findIndex(({ asked }) => asked),
      );
}
