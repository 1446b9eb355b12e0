import { VhostdError } from "../base/errors.ts";

/**
 * Where a session is. `preparing`: the front-end sets up early, and nothing is started until it has said that it is done.
 * `running`: the function was given the rings `queues` and works on those that are `enabled`.
 * `stopped`: the function holds still, the final indices are known, and a start at the same indices may go on from there.
 */
export type SessionState =
  | { readonly kind: "connected" }
  | { readonly kind: "negotiated"; readonly features: bigint }
  | { readonly kind: "preparing"; readonly features: bigint }
  | Running
  | { readonly kind: "stopped"; readonly features: bigint }
  | { readonly kind: "closed"; readonly reason: string };

/** Queue indices, ascending. */
export interface RunningQueues {
  readonly queues: readonly number[];
  readonly enabled: readonly number[];
}

interface Running extends RunningQueues {
  readonly kind: "running";
  readonly features: bigint;
}

export type StateKind = SessionState["kind"];

export type SessionEvent =
  | { readonly type: "acknowledge"; readonly features: bigint }
  | { readonly type: "prepare" }
  | { readonly type: "prepared" }
  | ({ readonly type: "start" } & RunningQueues)
  | { readonly type: "enable"; readonly enabled: readonly number[] }
  | { readonly type: "stop" }
  | { readonly type: "reset" }
  | { readonly type: "close"; readonly reason: string };

/** What leads where; what is not listed is not possible. */
const TRANSITIONS: Readonly<Record<StateKind, Readonly<Partial<Record<SessionEvent["type"], StateKind>>>>> = {
  connected: { acknowledge: "negotiated", prepare: "preparing", reset: "connected", close: "closed" },
  negotiated: {
    acknowledge: "negotiated",
    prepare: "preparing",
    start: "running",
    reset: "negotiated",
    close: "closed",
  },
  preparing: { acknowledge: "preparing", prepared: "negotiated", reset: "negotiated", close: "closed" },
  running: { acknowledge: "running", enable: "running", stop: "stopped", reset: "negotiated", close: "closed" },
  stopped: { acknowledge: "stopped", prepare: "preparing", start: "running", reset: "negotiated", close: "closed" },
  closed: {},
};

/** @throws VhostdError protocol where the event is not possible in this state */
export function transition(state: SessionState, event: SessionEvent): SessionState {
  const next = TRANSITIONS[state.kind][event.type];
  if (next === undefined) throw new VhostdError("protocol", `${event.type} is not possible while ${state.kind}`);
  const features = event.type === "acknowledge" ? event.features : featuresOf(state);
  switch (next) {
    case "connected":
      return { kind: "connected" };
    case "negotiated":
    case "preparing":
    case "stopped":
      return { kind: next, features };
    case "running":
      return { kind: "running", features, ...runningQueues(state, event) };
    case "closed":
      return { kind: "closed", reason: event.type === "close" ? event.reason : "" };
  }
}

function runningQueues(state: SessionState, event: SessionEvent): RunningQueues {
  if (event.type === "start") return { queues: event.queues, enabled: event.enabled };
  const before = state.kind === "running" ? state : { queues: [], enabled: [] };
  return { queues: before.queues, enabled: event.type === "enable" ? event.enabled : before.enabled };
}

/** Features that the front-end has acknowledged; 0 before it has. */
export function featuresOf(state: SessionState): bigint {
  return "features" in state ? state.features : 0n;
}
