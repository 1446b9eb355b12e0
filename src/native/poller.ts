import { checkFd } from "./arguments.ts";
import { addon, check } from "./load.ts";
import { onStop } from "./stop.ts";

/** Watches by token, until disposed of. Tokens are never used twice. */
const watches = new Map<number, Watch>();
/** Watches that keep the event loop alive. */
let holding = 0;
let running = false;

/** One fd that is being waited for. */
export class Watch implements Disposable {
  private state: "armed" | "silent" | "disposed" = "armed";
  private holds = true;

  /** For watch(). */
  constructor(
    private readonly token: number,
    private readonly handler: () => void,
  ) {
    watches.set(token, this);
    hold(1);
  }

  /** The handler shall run once more, at once where the fd is still ready. Nothing while armed or after disposal. */
  rearm(): void {
    if (this.state !== "silent") return;
    check(addon.pollerRearm(this.token), "rearm a watch");
    this.state = "armed";
  }

  /** This watch does not keep the event loop alive. */
  unref(): void {
    if (!this.holds || this.state === "disposed") return;
    this.holds = false;
    hold(-1);
  }

  /** For the poller. */
  fire(): void {
    if (this.state !== "armed") return;
    this.state = "silent";
    this.handler();
  }

  /** The handler never runs again, also where its fd is ready already. */
  [Symbol.dispose](): void {
    if (this.state === "disposed") return;
    this.state = "disposed";
    watches.delete(this.token);
    addon.pollerRemove(this.token);
    if (this.holds) hold(-1);
  }
}

/**
 * Calls `handler` once when the fd can be read ("in") or written ("out"), was hung up or failed; again after rearm().
 * The fd is borrowed for the call: the watch has a duplicate, which keeps the file open until the watch is disposed of.
 * An error thrown by a handler is an uncaught error of the process and does not keep other handlers from running.
 * @throws SystemError EPERM for a file that cannot be waited for (a regular one)
 */
export function watch(fd: number, events: "in" | "out", handler: () => void): Watch {
  checkFd(fd);
  if (!running) {
    check(addon.pollerStart(dispatch), "start the poller");
    running = true;
    onStop(stop);
  }
  return new Watch(check(addon.pollerAdd(fd, events === "out"), "watch a file descriptor"), handler);
}

function dispatch(tokens: readonly number[]): void {
  for (const token of tokens) {
    try {
      // A handler that ran before this one may have disposed of the watch.
      watches.get(token)?.fire();
    } catch (error) {
      queueMicrotask(() => {
        throw error;
      });
    }
  }
}

function hold(change: 1 | -1): void {
  const before = holding > 0;
  holding += change;
  if (holding > 0 !== before) addon.pollerHold(holding > 0);
}

function stop(): void {
  for (const each of [...watches.values()]) each[Symbol.dispose]();
  addon.pollerStop();
  running = false;
}
