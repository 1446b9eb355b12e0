/** How long the daemon waits for a device, milliseconds. The existing stack's limits where it states any. */
export const DEADLINES = {
  /** Opening a function and finishing its first reset: a controller may still be handling the PF's reset. */
  attach: 120_000,
  /** Finding out what a PF's admin queue can do, and what was in flight on it before a restart. */
  admin: 10_000,
  /** Reset and close when a function is removed. */
  detach: 3_000,
  /** A kernel that closes a function resets it, and waits a minute and more for one that does not answer. */
  close: 10_000,
  /** What an earlier process had begun with memory or a function is brought to an end. */
  takeUp: 10_000,
  /** Features, queues and DRIVER_OK. */
  start: 5_000,
  /** A device gives back what it has taken: its slowest request bounds this. */
  drain: 30_000,
  /** The internal status of a VF, where an operator asks for it. */
  ask: 5_000,
  /** What the queues of a VF have done, of which a description does without where it is not said. */
  stats: 1_000,
  /** As drain, where the VF is being removed and an operator waits, or where it has been tried before. */
  lastDrain: 5_000,
  /** Between two attempts to open a function again that was given away. */
  renew: 5_000,
  /** Status 0 after a session. */
  reset: 5_000,
  /** After a connection that never got to run the next one is taken up later and later: from, and up to. */
  firstBackoff: 250,
  longestBackoff: 8_000,
} as const;

export type Deadlines = Readonly<Record<keyof typeof DEADLINES, number>>;
