import { asError } from "../base/errors.ts";
import type { Logger } from "../base/log.ts";
import type { PciAddress } from "../pci/address.ts";
import type { DeviceState } from "../virtio/device-state.ts";
import { LOG_BYTE, type Tracking } from "../virtio/dirty-log.ts";
import type { StopNote } from "../virtio/mover.ts";
import { type DirtyPages, DirtyRate } from "./dirty-rate.ts";

/**
 * Where a VF is in the migration of its VM. At the source: `tracking`, the pages that it writes are marked; `handed-over`, it
 * was stopped meanwhile, so that its VM can go on elsewhere; `lost`, not all was marked. At the destination: `prepared`, it
 * was set up early; `arrived`, it goes on where it was stopped elsewhere.
 */
export const MIGRATION_STATES = ["tracking", "handed-over", "lost", "prepared", "arrived"] as const;
type Name = "none" | (typeof MIGRATION_STATES)[number];

/** What may follow what. */
const TRANSITIONS: Readonly<Record<Name, readonly Name[]>> = {
  none: ["tracking", "prepared", "arrived"],
  // Cancelled, or its front-end has gone; stopped; lost.
  tracking: ["none", "handed-over", "lost"],
  // Cancelled; with another front-end: it begins anew.
  "handed-over": ["tracking", "none", "lost", "prepared", "arrived"],
  lost: ["none", "tracking", "prepared", "arrived"],
  prepared: ["none", "prepared", "arrived", "tracking"],
  arrived: ["none", "tracking", "prepared"],
};

/** How long each phase has taken that there was, milliseconds with a fraction. */
export type MigrationPhases = {
  /** The PF was told to mark what the VF writes. */
  readonly begin_tracking?: number;
  /** From then to the stop; until now, where it is not stopped. */
  readonly tracking?: number;
  /** From the begin of the stop: kicks were disconnected. */
  readonly kicks_off?: number;
  /** From the begin of the stop: the VF was frozen, gave everything back, and all that it had written was marked. */
  readonly freeze?: number;
  /** The whole stop, with both, which go on side by side. */
  readonly stop?: number;
  readonly prepare?: number;
  /** Of a VF that has arrived. */
  readonly start?: number;
};

/** What is known of the migration of one VF. */
export type MigrationInfo = {
  readonly state: Exclude<Name, "none">;
  /** Of the last change, ISO 8601. */
  readonly since: string;
  readonly phases: MigrationPhases;
  /** Of its front-end's log; null where nobody looks. */
  readonly dirty: DirtyPages | null;
};

type Numbers = { -readonly [K in keyof MigrationPhases]: MigrationPhases[K] };

/** Follows the migration of one VF, in the order of its operations. What a VF does that does not migrate is not recorded. */
export class Migration {
  private name: Name = "none";
  private changed = new Date();
  private phases: Numbers = {};
  private trackingSince = 0;
  /** The function marks what it writes, for its front-end. */
  private marking = false;
  private rate: DirtyRate | undefined;
  /** The function has not run for the front-end that is connected. */
  private fresh = true;
  /** Process of the front-end that it ran for last. */
  private lastPeer: number | undefined;

  constructor(
    private readonly log: Logger,
    private readonly onChange: () => void,
    private readonly now = () => performance.now(),
  ) {}

  /** Null where the VF does not migrate. */
  get info(): MigrationInfo | null {
    const { name, phases } = this;
    if (name === "none") return null;
    const running = name === "tracking" ? { tracking: this.now() - this.trackingSince } : {};
    const times = Object.entries({ ...phases, ...running }).map(([phase, time]) => [phase, rounded(time)]);
    const dirty = this.rate?.found ?? null;
    return { state: name, since: this.changed.toISOString(), phases: Object.fromEntries(times), dirty };
  }

  /** The front-end has the pages marked that the function writes. */
  get isMarking(): boolean {
    return this.marking;
  }

  /** An earlier process has served the front-end that is connected. */
  joined(peer: number | undefined): void {
    this.fresh = false;
    this.lastPeer = peer;
  }

  /** This VF takes the place of the one that `before` is of, after its last session. */
  follows(before: Migration): void {
    this.name = before.name;
    this.changed = before.changed;
    this.phases = before.phases;
    this.lastPeer = before.lastPeer;
  }

  /** The function is told what to mark, or nothing any more, by `work`. @throws what that does */
  async track(wanted: Tracking | undefined, work: () => Promise<void>): Promise<void> {
    if (wanted === undefined) {
      this.lookNoMore();
      this.marking = false;
      if (this.name === "tracking") this.enter("none");
      return await work();
    }
    const began = this.now();
    try {
      await work();
    } catch (error) {
      this.lost();
      throw error;
    }
    // One that goes on marking in another log is where it was.
    const goesOn = this.marking && (this.name === "tracking" || this.name === "handed-over");
    this.marking = true;
    if (!goesOn) {
      this.phases = { begin_tracking: this.now() - began };
      this.trackingSince = this.now();
      this.enter("tracking");
    }
    this.look(wanted);
  }

  /** Not all that the function writes is marked any more. */
  lost(): void {
    this.lookNoMore();
    if (this.marking && (this.name === "tracking" || this.name === "handed-over")) this.enter("lost");
    this.marking = false;
  }

  /** The function is stopped by `work`, for as long as its front-end likes. @throws what that does */
  async stop<T>(work: (note: StopNote) => Promise<T>): Promise<T> {
    if (this.name !== "tracking") return await work(() => {});
    const began = this.now();
    const { trackingSince } = this;
    const times: Numbers = {};
    const result = await work((step) => {
      times[step] = this.now() - began;
    });
    this.phases = { ...this.phases, tracking: began - trackingSince, ...times, stop: this.now() - began };
    // While it was stopped it may have turned out that not all is marked.
    if (this.name === "tracking") this.enter("handed-over");
    return result;
  }

  /** The function is set up early by `work`. @throws what that does */
  async prepare(work: () => Promise<void>): Promise<void> {
    const began = this.now();
    await work();
    if (!TRANSITIONS[this.name].includes("prepared")) return;
    this.phases = { prepare: this.now() - began };
    this.enter("prepared");
  }

  /**
   * The function is started by `work`.
   * @param peer process of the front-end, 0 where it has no number here
   * @throws what that does
   */
  async start(
    { queues }: Pick<DeviceState, "queues">,
    peer: number | undefined,
    work: () => Promise<void>,
  ): Promise<void> {
    const goesOn = queues.some(({ lastAvail, lastUsed }) => lastAvail !== 0 || lastUsed !== 0);
    // A front-end that has lost its connection comes back to rings in mid-use, too.
    const comesBack = peer !== undefined && peer === this.lastPeer && this.name !== "handed-over";
    const mayArrive = this.name !== "tracking" && this.name !== "arrived";
    const arrives = this.name === "prepared" || (this.fresh && goesOn && !comesBack && mayArrive);
    const [before, began] = [this.name, this.now()];
    await work();
    this.fresh = false;
    this.lastPeer = peer;
    // Meanwhile it may have turned out that not all is marked.
    if (this.name !== before) return;
    if (arrives) {
      const { prepare } = before === "prepared" ? this.phases : {};
      this.phases = { ...(prepare === undefined ? {} : { prepare }), start: this.now() - began };
      this.enter("arrived");
    } else if (before === "handed-over") this.goOn();
    else if (before === "lost") this.enter("none");
  }

  /** The function was reset: what was prepared is gone. */
  wasReset(): void {
    if (this.name === "prepared") this.enter("none");
  }

  /** The front-end has gone. What it handed over stays known until the next one begins. */
  ended(): void {
    this.lookNoMore();
    this.marking = false;
    this.fresh = true;
    if (this.name !== "none" && this.name !== "handed-over" && this.name !== "lost") this.enter("none");
  }

  /** Lets go of what is this process's. */
  abandon(): void {
    this.lookNoMore();
  }

  /** Cancelled: its VM runs on here. */
  private goOn(): void {
    const { begin_tracking } = this.phases;
    this.phases = begin_tracking === undefined ? {} : { begin_tracking };
    this.enter(this.marking ? "tracking" : "none");
  }

  /** No further than guest memory goes: of a sparse file each page that is looked at is made. */
  private look({ log, end }: Tracking): void {
    this.lookNoMore();
    try {
      this.rate = new DirtyRate({ ...log, size: Math.ceil(end / LOG_BYTE) });
    } catch (error) {
      this.log.debug(`its dirty log cannot be looked at: ${asError(error).message}`);
    }
  }

  private lookNoMore(): void {
    this.rate?.[Symbol.dispose]();
    this.rate = undefined;
  }

  private enter(next: Name): void {
    if (!TRANSITIONS[this.name].includes(next)) throw new Error(`a migration cannot go from ${this.name} to ${next}`);
    this.name = next;
    this.changed = new Date();
    if (next === "none") this.phases = {};
    this.onChange();
  }
}

/** As subscribers of events are told. The state is "none" after a cancel, and where a front-end has gone. */
export function migrationEvent(vf: PciAddress, info: MigrationInfo | null) {
  return { type: "migration", vf, ...(info ?? { state: "none" as const }) };
}

/** Microseconds are enough. */
function rounded(milliseconds: number): number {
  return Math.round(milliseconds * 1000) / 1000;
}
