import type { Logger } from "../../../src/base/log.ts";
import { liveFds } from "../../../src/native/fd.ts";
import { socketPair } from "../../../src/native/sys.ts";
import { Session, type SessionEnd } from "../../../src/vhost-user/session.ts";
import { BAD_INPUT_MEMORY } from "../../kit/frontend/bad-input.ts";
import { VhostUserFrontend } from "../../kit/frontend/frontend.ts";
import { MockTarget, type MockTargetOptions } from "../../kit/mock-target.ts";

/** A session with a mock VF, and the front-end at its other end. */
export interface Pair extends AsyncDisposable {
  readonly frontend: VhostUserFrontend;
  readonly target: MockTarget;
  readonly session: Session;
  readonly ended: Promise<SessionEnd>;
  /** Lines that the session has logged at level info and above. */
  readonly lines: string[];
}

/** Long enough that only the tests about it see a start after it. Milliseconds. */
export const LONG_QUIET = 600_000;

type PairOptions = MockTargetOptions & { quietPeriod?: number; handlerTimeout?: number };

/** Disposing of it ends the session and holds that no fd is left. */
export function connect(options: PairOptions = {}): Pair {
  const before = liveFds();
  const pair = connectUncounted(options);
  return {
    ...pair,
    async [Symbol.asyncDispose]() {
      await pair[Symbol.asyncDispose]();
      if (liveFds() !== before) throw new Error(`${liveFds() - before} fds are left`);
    },
  };
}

/** For pairs between which fds move: the test counts them. */
export function connectUncounted(options: PairOptions = {}): Pair {
  const [ours, theirs] = socketPair();
  const target = new MockTarget(options);
  const lines: string[] = [];
  const log = recordingLogger(lines);
  const { quietPeriod = LONG_QUIET, handlerTimeout = 5_000 } = options;
  const session = new Session(ours, target, { log, quietPeriod, handlerTimeout });
  const frontend = new VhostUserFrontend(theirs);
  const ended = session.run();
  return {
    frontend,
    target,
    session,
    ended,
    lines,
    async [Symbol.asyncDispose]() {
      frontend[Symbol.dispose]();
      await ended;
    },
  };
}

export function recordingLogger(lines: string[]): Logger {
  const log: Logger = {
    error: (message) => lines.push(message),
    warn: (message) => lines.push(message),
    info: (message) => lines.push(message),
    debug() {},
    child: () => log,
  };
  return log;
}

/** Runs `body` and says by how many the open fds of this process have grown. */
export async function fdsLeftBy(body: () => Promise<void>): Promise<number> {
  const before = liveFds();
  await body();
  return liveFds() - before;
}

export const ONE_MEGABYTE = 1 << 20;
export const REGIONS = BAD_INPUT_MEMORY;

export async function startRunning(frontend: VhostUserFrontend, queues = 2): Promise<void> {
  await frontend.negotiate();
  await frontend.setupMemory(REGIONS);
  await frontend.startQueues(queues, { size: 64 });
}
