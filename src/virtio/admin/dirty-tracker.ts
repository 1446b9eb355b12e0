import { Deadline } from "../../base/deadline.ts";
import { asError } from "../../base/errors.ts";
import { OperationQueue } from "../../base/operation-queue.ts";
import { DirtyLogMapping, mapBytes } from "../../native/dirty-log.ts";
import { fileInfo } from "../../native/sys.ts";
import { LOG_PAGE, type Tracking } from "../dirty-log.ts";
import { AdminRefusal } from "./admin-request.ts";
import { checkLog, type DirtyMap, type MapSource, makeMap, pagesBelow } from "./dirty-map.ts";
import { TRACKING_KIND, type TrackingModeName } from "./vendor.ts";

/** Milliseconds between two looks at what the device has marked. */
const LOOK_INTERVAL = 500;
/** Milliseconds for the answer to one, and for collecting what there is. */
const LOOK_TIMEOUT = 10_000;
/** Milliseconds at least to collect the rest of a device that stands still: else everything counts as written. */
const LAST_TIMEOUT = 1_000;
/** The range is named by its begin. */
const RANGE = { address: 0 } as const;

/** What a tracker needs of the VF and its PF. */
export interface TrackerHost extends MapSource {
  /** For people. */
  readonly name: string;
  /** As the PF says of itself, the best first. */
  readonly modes: readonly TrackingModeName[];
  /** Told once, with the reason, when the PF can be asked for nothing any more. */
  onDead(handler: (error: Error) => void): Disposable;
  log(text: string): void;
}

/** One log that is being written. */
interface Marking {
  /** File, place and end: what tells it from another. */
  readonly key: string;
  readonly mode: TrackingModeName;
  /** Who ends it wants to know all. */
  readonly own: boolean;
  readonly mapping: DirtyLogMapping;
  readonly map: DirtyMap;
  readonly pages: number;
}

/** `lost`: not all that the VF writes is marked. */
type State = { readonly kind: "off" } | { readonly kind: "on" | "lost"; readonly marking: Marking };

/**
 * The pages that one VF writes, marked in its front-end's log. Where the device does not write the log itself, what it has
 * noted is brought there twice a second, and once more when it has been frozen. A device that stops marking is noticed
 * within the same time; all pages count as written then. Operations never interleave.
 */
export class DirtyTracker {
  private state: State = { kind: "off" };
  /** Maps that the device may still write, because it did not say that it has stopped. */
  private stuck: DirtyMap[] = [];
  private readonly operations = new OperationQueue();
  private readonly death: Disposable;
  private lostHandler: (error: Error) => void = () => {};
  private timer: ReturnType<typeof setTimeout> | undefined;
  /** Somebody waits for the rest: a look in between is not to hold that up. */
  private hurried = 0;
  private closed = false;

  /** @param left an earlier process may have begun, and where it stopped is not known */
  constructor(
    private readonly host: TrackerHost,
    private readonly mode: TrackingModeName,
    private left: boolean,
  ) {
    this.death = host.onDead((error) => this.lose(error));
  }

  /** Replaces the earlier handler. Called once for each `track`. */
  onLost(handler: (error: Error) => void): void {
    this.lostHandler = handler;
  }

  /** See StateMover.track. @throws VhostdError */
  track(wanted: Tracking | undefined, deadline: Deadline): Promise<TrackingModeName | undefined> {
    return this.hurry(async () => {
      if (wanted === undefined) {
        await this.end(deadline);
        return undefined;
      }
      checkLog(wanted);
      const key = keyOf(wanted);
      const { state } = this;
      if (state.kind === "on" && state.marking.key === key) return state.marking.mode;
      // What was written in between, or by an earlier process's will, is not known.
      const all = this.left || state.kind !== "off";
      await this.end(deadline);
      const marking = await this.begin(wanted, key, deadline);
      this.state = { kind: "on", marking };
      if (all) await this.markAll(marking);
      this.schedule();
      return marking.mode;
    });
  }

  /**
   * The device stands still: all that it has written is marked when it resolves. Never rejects.
   * @param wasReset with which it may have forgotten what it was told: see `confirm`
   */
  finish(deadline: Deadline, wasReset = false): Promise<void> {
    if (this.state.kind === "off") return Promise.resolve();
    return this.hurry(async () => {
      const { state } = this;
      if (state.kind === "off") return;
      try {
        const time = Math.max(LAST_TIMEOUT, deadline.remaining);
        const last = Deadline.after(time, `collecting what ${this.host.name} has written`);
        if (state.kind === "on") return await this.collectAll(state.marking, last);
      } catch (error) {
        if (!(wasReset && error instanceof AdminRefusal)) this.lose(asError(error));
      }
      try {
        await this.markAll(state.marking);
      } catch (error) {
        this.host.log(`its dirty log is gone: ${asError(error).message}`);
      }
    });
  }

  /** Until this is disposed of nobody looks in between. */
  hold(): Disposable {
    this.hurried++;
    return { [Symbol.dispose]: () => void this.hurried-- };
  }

  /** The device was reset, and is to run again: where it has forgotten to mark what it writes it begins anew. Never rejects. */
  confirm(deadline: Deadline): Promise<void> {
    if (this.state.kind !== "on") return Promise.resolve();
    return this.hurry(async () => {
      const { state } = this;
      if (state.kind !== "on") return;
      const { commands, vdevId } = this.host;
      const { map, mode, pages } = state.marking;
      try {
        await commands.pending(vdevId, RANGE, deadline).catch(async (error) => {
          if (!(error instanceof AdminRefusal)) throw error;
          await commands.start(vdevId, mode, rangeOf(pages), map.place, deadline);
          await this.markAll(state.marking);
        });
      } catch (error) {
        this.lose(asError(error));
      }
    });
  }

  /** The VF is at rest: what it may have gone on marking it marks no more. Never rejects. */
  quiet(): Promise<void> {
    if (this.stuck.length === 0) return Promise.resolve();
    return this.hurry(async () => {
      if (this.host.settled()) await this.releaseStuck();
    });
  }

  /** Lets go of everything of this process without a word to the device. */
  abandon(): void {
    this.closed = true;
    clearTimeout(this.timer);
    this.death[Symbol.dispose]();
    if (this.state.kind !== "off") {
      this.state.marking.mapping[Symbol.dispose]();
      this.state.marking.map.abandon();
    }
    this.state = { kind: "off" };
    for (const map of this.stuck.splice(0)) map.abandon();
  }

  private async begin(wanted: Tracking, key: string, deadline: Deadline): Promise<Marking> {
    const { commands, vdevId } = this.host;
    const { fd, offset } = wanted.log;
    const pages = pagesBelow(wanted.end);
    const mode = this.modeFor(wanted);
    using undo = new DisposableStack();
    const mapping = undo.use(new DirtyLogMapping(fd, offset, mapBytes("bitmap", pages)));
    const map = await makeMap(mode, this.host, wanted, mapping, deadline);
    try {
      await commands.start(vdevId, mode, rangeOf(pages), map.place, deadline);
    } catch (error) {
      this.stuck.push(map);
      if (this.host.settled()) await this.releaseStuck();
      throw error;
    }
    undo.move();
    return { key, mode, own: wanted.own !== undefined, mapping, map, pages };
  }

  /** What was tried when the VF was attached, unless something else is preferred. */
  private modeFor({ own }: Tracking): TrackingModeName {
    if (own?.form === undefined || TRACKING_KIND[this.mode].form === own.form) return this.mode;
    return this.host.modes.find((mode) => TRACKING_KIND[mode].form === own.form) ?? this.mode;
  }

  /** Nothing is marked any more, also where nothing was. @throws VhostdError; what the device may write stays mapped then */
  private async end(deadline: Deadline): Promise<void> {
    clearTimeout(this.timer);
    const { state } = this;
    this.state = { kind: "off" };
    if (state.kind !== "off") {
      const { mapping, map, own } = state.marking;
      this.stuck.push(map);
      using _done = mapping;
      if (own && state.kind === "on") await map.collect(deadline, () => true);
    }
    const { commands, vdevId } = this.host;
    if (this.left) {
      await commands.stop(vdevId, RANGE, deadline, "once").catch((error) => {
        if (!(error instanceof AdminRefusal)) throw error;
      });
      this.left = false;
    }
    if (this.stuck.length === 0) return;
    await commands.stop(vdevId, RANGE, deadline).catch(async (error) => {
      // It may be the second one: the first was answered when nobody waited for that any more.
      if (!isNo(error) || (await this.isMarking(deadline))) throw error;
    });
    await this.releaseStuck();
  }

  /** @throws VhostdError where the device has not marked all */
  private async collectAll({ mode, map }: Marking, deadline: Deadline): Promise<void> {
    const { commands, vdevId } = this.host;
    // What it writes itself does not show whether it still does.
    if (TRACKING_KIND[mode].push) await commands.pending(vdevId, RANGE, deadline);
    await map.collect(deadline, () => true);
  }

  private async isMarking(deadline: Deadline): Promise<boolean> {
    const { commands, vdevId } = this.host;
    try {
      await commands.pending(vdevId, RANGE, deadline);
      return true;
    } catch (error) {
      if (isNo(error)) return false;
      throw error;
    }
  }

  private async releaseStuck(): Promise<void> {
    for (const map of this.stuck.splice(0)) {
      await map
        .release()
        .catch((error) => this.host.log(`a map of dirty pages stays mapped: ${asError(error).message}`));
    }
  }

  private markAll({ mapping, pages }: Marking): Promise<void> {
    return mapping.markMany(0, pages);
  }

  private lose(error: Error): void {
    const { state } = this;
    if (state.kind !== "on") return;
    clearTimeout(this.timer);
    this.state = { kind: "lost", marking: state.marking };
    this.lostHandler(error);
  }

  /** Nobody waits for the next look, and the process does not stay for it. */
  private schedule(): void {
    clearTimeout(this.timer);
    if (this.closed || this.state.kind !== "on") return;
    this.timer = setTimeout(
      () => void this.operations.run(() => this.look()).then(() => this.schedule()),
      LOOK_INTERVAL,
    );
    this.timer.unref();
  }

  private async look(): Promise<void> {
    const { state } = this;
    if (state.kind !== "on" || this.hurried > 0) return;
    try {
      const deadline = Deadline.after(LOOK_TIMEOUT, `a look at what ${this.host.name} has written`);
      const { commands, vdevId } = this.host;
      const pending = await commands.pending(vdevId, RANGE, deadline);
      if (pending > 0 || state.marking.mode === "pushBytemap")
        await state.marking.map.collect(deadline, () => this.hurried === 0);
    } catch (error) {
      if (!this.closed) this.lose(asError(error));
    }
  }

  private async hurry<T>(operation: () => Promise<T>): Promise<T> {
    using _hurried = this.hold();
    return await this.operations.run(operation);
  }
}

function isNo(error: unknown): boolean {
  return error instanceof AdminRefusal && error.final;
}

function rangeOf(pages: number) {
  return { ...RANGE, length: pages * LOG_PAGE, pageSize: LOG_PAGE };
}

function keyOf({ log, end }: Tracking): string {
  const { dev, ino } = fileInfo(log.fd);
  return [dev, ino, log.offset, log.size, end].join();
}
