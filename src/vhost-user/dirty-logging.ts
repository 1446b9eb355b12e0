import { asError, VhostdError } from "../base/errors.ts";
import type { Logger } from "../base/log.ts";
import type { OwnedFd } from "../native/fd.ts";
import { fileInfo } from "../native/sys.ts";
import { type DirtyLog, LOG_BYTE, LOG_PAGE } from "../virtio/dirty-log.ts";
import type { BoundedLog } from "./bounded-log.ts";
import { CompletedLog } from "./completed-log.ts";
import { checkSharedFile, type GuestMemory, type Region } from "./guest-memory.ts";
import type { LOG_DESCRIPTION, PayloadOf } from "./messages.ts";
import type { SessionRecord } from "./record.ts";
import type { SessionTarget } from "./target.ts";

type LogDescription = PayloadOf<typeof LOG_DESCRIPTION>;

/**
 * Quiet moments in a row before a session ends that may: 5 s where pages are to be marked, and 1 s after the front-end has
 * taken that back. QEMU aborts its guest where a connection is lost while it ends the marking of pages, and who gives a
 * migration up does so soon after it went wrong.
 */
const QUIET_MOMENTS = { wanted: 100, takenBack: 20 } as const;

/** A log with its file. */
interface HeldLog {
  readonly fd: OwnedFd;
  readonly offset: number;
  readonly size: number;
}

/**
 * `on`: the function marks what it writes in this log, up to this end of guest memory. `lost`: it does not any more; it stands
 * still, every page was marked for it, and the session ends as soon as the front-end has seen that.
 */
type LoggingState =
  | { readonly kind: "off" }
  | { readonly kind: "on"; readonly log: HeldLog; readonly end: number }
  | {
      readonly kind: "lost";
      readonly error: Error;
      /** In which all was marked. */
      readonly log: HeldLog | undefined;
      readonly completed: CompletedLog;
    };

type StateKind = LoggingState["kind"];

/** What leads where; what is not listed is not possible. */
const TRANSITIONS: Readonly<Record<StateKind, readonly StateKind[]>> = {
  off: ["on", "lost"],
  on: ["on", "off", "lost"],
  lost: ["lost"],
};

/** Has the function mark the pages that it writes in the front-end's log: VHOST_F_LOG_ALL, SET_LOG_BASE. */
export class DirtyLogging implements Disposable {
  private state: LoggingState = { kind: "off" };
  /** What the front-end gave last, until it wants nothing to be marked any more. */
  private log: HeldLog | undefined;
  /** Why an earlier process was to mark all pages: it may have died before it had. */
  private left: Error | undefined;
  /** How long the session has been one that may end, for which reason. */
  private quiet = { wanted: false, moments: 0 };

  constructor(
    private readonly target: SessionTarget,
    private readonly memory: GuestMemory,
    private readonly logger: Logger,
    /** For what a front-end can cause again and again. */
    private readonly chatter: BoundedLog,
    private unmarked = false,
  ) {}

  /** The function has run while pages were to be marked, and there was no log to mark them in. */
  get ranUnmarked(): boolean {
    return this.unmarked;
  }

  /** Why not all is marked that the function wrote; undefined where it is. */
  get loss(): Error | undefined {
    return this.state.kind === "lost" ? this.state.error : this.left;
  }

  get isOn(): boolean {
    return this.state.kind === "on";
  }

  /** SET_LOG_BASE. Takes ownership of `fd`. @throws VhostdError protocol */
  accept(description: LogDescription, fd: OwnedFd): void {
    using undo = new DisposableStack();
    undo.use(fd);
    const log = checkLog(description, fd);
    if (this.log !== undefined && sameLog(this.log, log)) return;
    undo.move();
    const before = this.log;
    this.log = log;
    this.letGo(before);
  }

  /**
   * Brings the function to what the front-end wants now.
   * @param wanted VHOST_F_LOG_ALL is acknowledged
   * @param runs the function does
   * @throws VhostdError where the function may write what nobody marks: `lose` is to be called, when it stands still
   */
  async follow(wanted: boolean, runs: boolean): Promise<void> {
    const { state, log } = this;
    const { end } = this.memory;
    if (state.kind === "lost") {
      // The front-end may not have looked once more into the one that it has given up.
      if (log !== state.log) await this.completeAnew(state.error, log);
      return;
    }
    if (this.left !== undefined) return await this.lose(this.left);
    if (!wanted || log === undefined || end === 0) {
      if (state.kind === "on") await this.turnOff(state.log, wanted);
      this.unmarked = wanted && (runs || this.unmarked);
      return;
    }
    if (state.kind === "on" && state.log === log && state.end === end) return;
    if (log.size * LOG_BYTE < end) {
      // Memory comes before the log where a front-end begins once more.
      if (!runs) {
        if (state.kind === "on") await this.turnOff(state.log, wanted);
        return;
      }
      throw new VhostdError(
        "invalid",
        `a dirty log of ${log.size} bytes is too small for guest memory up to 0x${end.toString(16)}, which takes ` +
          `${Math.ceil(end / LOG_BYTE)}`,
      );
    }
    await this.target.track({ log: borrowed(log), end });
    this.enter({ kind: "on", log, end });
    if (this.unmarked) await this.markAll(new CompletedLog(), log, this.memory.list);
    this.unmarked = false;
    if (state.kind === "on") this.letGo(state.log);
    else this.chatter.info(`pages that the device writes are marked, up to 0x${end.toString(16)}`);
  }

  /** The function stands still, and has written what nobody has marked: every page of guest memory may be it. Never rejects. */
  async lose(error: Error): Promise<void> {
    const before = this.state;
    if (before.kind === "lost") return;
    await this.completeAnew(error, this.log ?? (before.kind === "on" ? before.log : undefined));
    if (before.kind === "on") this.letGo(before.log);
  }

  /**
   * To be asked in each quiet moment: the session may end for what was lost. The front-end has seen what was marked, or does
   * not want to know any more, and is not about to say that.
   * @param wanted VHOST_F_LOG_ALL is acknowledged
   */
  mayEnd(wanted: boolean): boolean {
    const before = this.quiet.wanted === wanted ? this.quiet.moments : 0;
    this.quiet = { wanted, moments: this.isSeen(wanted) ? before + 1 : 0 };
    return this.quiet.moments > (wanted ? QUIET_MOMENTS.wanted : QUIET_MOMENTS.takenBack);
  }

  /**
   * The front-end has seen what was marked for what was lost, or does not want to know any more. To a VMM in migration a
   * connection that is lost means that there is nothing more to see.
   * @param wanted VHOST_F_LOG_ALL is acknowledged
   */
  isSeen(wanted: boolean): boolean {
    if (this.state.kind !== "lost") return false;
    return !wanted || this.log === undefined || this.state.completed.isSeen(borrowed(this.log));
  }

  /** The session ends, and nothing is marked from now on. Never throws. */
  async end(): Promise<void> {
    if (this.state.kind !== "off") await this.untrack();
  }

  /** After the end: marks all of these regions, where a function that did not come to rest was to mark what it writes. */
  async complete(regions: readonly Region[]): Promise<void> {
    if (this.state.kind === "on") await this.markAll(new CompletedLog(), this.log, regions);
  }

  snapshot(): { record: SessionRecord["log"]; fd: number } | undefined {
    if (this.log === undefined) return undefined;
    const { fd, offset, size } = this.log;
    const { loss } = this;
    return { record: { offset, size, ...(loss === undefined ? {} : { lost: loss.message }) }, fd: fd.number };
  }

  /**
   * Goes on with a stored log, checked like one that a front-end sends. The function is told again by `follow`, which also
   * marks all pages where that is to be done.
   * @param fd owned by this from here on
   * @throws VhostdError
   */
  revive({ offset, size, lost }: NonNullable<SessionRecord["log"]>, fd: OwnedFd | undefined): void {
    if (fd === undefined) throw new VhostdError("invalid", "the stored session lacks the fd log");
    this.accept({ offset, size }, fd);
    if (lost !== undefined) this.left = new VhostdError("io", lost);
  }

  [Symbol.dispose](): void {
    if (this.state.kind === "on") this.state.log.fd[Symbol.dispose]();
    this.log?.fd[Symbol.dispose]();
  }

  private async completeAnew(error: Error, log: HeldLog | undefined): Promise<void> {
    const completed = new CompletedLog();
    this.enter({ kind: "lost", error, log, completed });
    await this.markAll(completed, log, this.memory.list);
  }

  private async turnOff(log: HeldLog, wanted: boolean): Promise<void> {
    await this.untrack();
    this.enter({ kind: "off" });
    const given = this.log;
    // Guest memory may have grown beyond it until a front-end begins anew, which gives another one then.
    if (!wanted) this.log = undefined;
    this.letGo(log);
    if (given !== log) this.letGo(given);
  }

  /** Where it fails nobody is harmed: nobody looks into the log any more. */
  private async untrack(): Promise<void> {
    try {
      await this.target.track(undefined);
    } catch (error) {
      this.logger.warn("the function does not stop to mark pages", asError(error));
    }
  }

  private async markAll(completed: CompletedLog, log: HeldLog | undefined, regions: readonly Region[]): Promise<void> {
    if (log === undefined) return;
    try {
      await completed.mark(
        borrowed(log),
        regions.map(({ range }) => range),
      );
    } catch (error) {
      this.logger.error("the dirty log could not be completed", asError(error));
    }
  }

  /** Closes a log that neither the front-end nor the function uses now. */
  private letGo(log: HeldLog | undefined): void {
    const isUsed = log === this.log || (this.state.kind === "on" && this.state.log === log);
    if (!isUsed) log?.fd[Symbol.dispose]();
  }

  private enter(next: LoggingState): void {
    const { kind } = this.state;
    if (!TRANSITIONS[kind].includes(next.kind)) throw new Error(`dirty logging cannot go from ${kind} to ${next.kind}`);
    this.state = next;
  }
}

/** @throws VhostdError protocol with the value seen and the limit */
function checkLog({ offset, size }: LogDescription, fd: OwnedFd): HeldLog {
  const refuse = (what: string): never => {
    throw new VhostdError("protocol", `dirty log: ${what}`);
  };
  checkSharedFile(fd, offset, size, refuse);
  if (offset % LOG_PAGE !== 0) refuse(`its offset 0x${offset.toString(16)} is not a multiple of ${LOG_PAGE}`);
  return { fd, offset, size };
}

/** One that says it once for each pair of queues has not changed anything. */
function sameLog(one: HeldLog, other: HeldLog): boolean {
  if (one.offset !== other.offset || one.size !== other.size) return false;
  const [a, b] = [fileInfo(one.fd.number), fileInfo(other.fd.number)];
  return a.dev === b.dev && a.ino === b.ino;
}

function borrowed({ fd, offset, size }: HeldLog): DirtyLog {
  return { fd: fd.number, offset, size };
}
