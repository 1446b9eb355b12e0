import type { Deadline } from "../../base/deadline.ts";
import { VhostdError } from "../../base/errors.ts";
import { rewound, type SavedState, undrained } from "../admin/vendor-state.ts";
import type { DeviceState } from "../device-state.ts";
import type { FreezeMode, MoverHost } from "../mover.ts";
import type { RingMemory } from "../split-ring.ts";
import { type InternalSteps, isImpatience, withMore } from "./vendor-steps.ts";

/** Milliseconds between two looks at a device that drains: the first, and the longest. */
const DRAIN_INTERVAL = { first: 1, longest: 20 } as const;
/** Milliseconds of a stop, and their part of it at most, that are kept for saying why the device has not drained. */
const REASON_TIME = { most: 3000, share: 1 / 4 } as const;

/** How a running device is to be stopped. */
export interface DrainTask {
  readonly host: Pick<MoverHost, "deviceClass">;
  readonly memory: RingMemory;
  /** Of a queue, by its index. */
  readonly modeOf: (queue: number) => FreezeMode;
  /** What the device saves; it need not be freezed. */
  readonly save: (deadline: Deadline) => Promise<SavedState>;
}

/**
 * Freezes the running device, with all given back that its queues must not keep.
 * @returns the state that it stands in
 * @throws VhostdError timedOut where it does not drain
 */
export async function drain(steps: InternalSteps, task: DrainTask, deadline: Deadline): Promise<DeviceState> {
  const { memory, modeOf, host, save } = task;
  await firstFreeze(steps, task, deadline);
  let reason: string | undefined;
  try {
    for (let interval: number = DRAIN_INTERVAL.first; ; interval = Math.min(2 * interval, DRAIN_INTERVAL.longest)) {
      const saved = rewound(await save(deadline), memory, host.deviceClass);
      reason = undrained(saved, memory, modeOf);
      if (reason === undefined) return saved.state;
      // Freezed it would keep what it has taken.
      await steps.bringTo("quiesced", deadline);
      deadline.check();
      await Bun.sleep(Math.min(interval, deadline.remaining));
      await steps.bringTo("freezed", deadline);
    }
  } catch (cause) {
    // Time passes while the device is asked, too: what it was that had not drained is the better answer.
    if (reason === undefined || !deadline.expired) throw cause;
    throw new VhostdError("timedOut", `${deadline.error().message}: ${reason}`, { cause });
  }
}

/**
 * A device may refuse it until it has drained.
 * @throws VhostdError with what has not drained, where that is why
 */
async function firstFreeze(steps: InternalSteps, task: DrainTask, deadline: Deadline): Promise<void> {
  const { memory, modeOf, host, save } = task;
  const kept = Math.min(REASON_TIME.most, deadline.remaining * REASON_TIME.share);
  try {
    await steps.freeze(deadline.before(kept));
  } catch (cause) {
    // Behind a command that is never answered nothing else is either.
    if (!isImpatience(cause) || steps.blocked) throw cause;
    const reason = await save(deadline)
      .then((saved) => undrained(rewound(saved, memory, host.deviceClass), memory, modeOf))
      .catch(() => undefined);
    throw reason === undefined ? cause : withMore(cause, `: ${reason}`);
  }
}
