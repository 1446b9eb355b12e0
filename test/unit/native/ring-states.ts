import { Deadline } from "../../../src/base/deadline.ts";
import { VhostdError } from "../../../src/base/errors.ts";
import type { RingEngine, RingState } from "../../../src/native/ring-engine.ts";

/** The rings of an engine that is not parked: on a busy machine its worker may be held up inside a turn. */
export function ringsOf(engine: RingEngine): Promise<readonly RingState[]> {
  return Deadline.after(5000, "the worker's turn").poll(() => {
    try {
      return engine.rings();
    } catch (error) {
      if (error instanceof VhostdError && error.code === "busy") return undefined;
      throw error;
    }
  }, 1);
}
