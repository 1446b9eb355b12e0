const started: (() => void)[] = [];

/** For the facilities of this folder: `stop` is called by the next stopNative(). */
export function onStop(stop: () => void): void {
  started.push(stop);
}

/**
 * Stops the poller, the relay and the slow calls (waiting for those under way), in the reverse order of their start;
 * closes of peers' files are waited for a second at most.
 * Called by every program before it exits: process.exit skips the clean-up of native modules. Safe to call twice; what
 * is used afterwards starts again. Watches and relay connections that still exist never fire again.
 */
export function stopNative(): void {
  for (let stop = started.pop(); stop !== undefined; stop = started.pop()) stop();
}
