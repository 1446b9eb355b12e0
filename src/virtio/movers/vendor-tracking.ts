import type { Deadline } from "../../base/deadline.ts";
import { VhostdError } from "../../base/errors.ts";
import { proveTracking } from "../admin/dirty-proof.ts";
import { DirtyTracker, type TrackerHost } from "../admin/dirty-tracker.ts";
import type { LogMemory } from "../admin/log-memory.ts";
import { TRACKING_LABEL, type TrackingModeName } from "../admin/vendor.ts";
import type { Tracking } from "../dirty-log.ts";
import type { MoverSnapshot } from "../mover.ts";
import type { ManagedVf } from "./vendor.ts";

/** How a PF can mark the pages that its VFs write, and with what memory. */
export interface TrackingMeans {
  /** As it says of itself, the best first. */
  readonly modes: readonly TrackingModeName[];
  readonly memory: LogMemory;
  /** Something that a person should know of. */
  log(text: string): void;
}

/** Whether the pages that one VF writes can be marked, and who does it. */
export class VendorTracking {
  private mode: TrackingModeName | undefined;
  private tracker: DirtyTracker | undefined;
  private lostHandler: (error: Error) => void = () => {};
  /** It was reset, and with that may have forgotten that its pages are marked. */
  private unsure = false;

  /** @param proven the mode that an earlier process has tried; not trusted */
  constructor(
    private readonly vf: ManagedVf,
    private readonly name: string,
    proven: string | undefined,
  ) {
    this.mode = vf.tracking?.modes.find((mode) => mode === proven);
    if (this.mode !== undefined) this.tracker = this.makeTracker(this.mode, true);
  }

  get proven(): boolean {
    return this.mode !== undefined;
  }

  /** See StateMover.prove. */
  async prove(deadline: Deadline): Promise<void> {
    const { tracking } = this.vf;
    if (tracking === undefined || tracking.modes.length === 0) return;
    const proof = await proveTracking(tracking.modes, this.host(tracking), deadline);
    if ("reason" in proof) {
      tracking.log(`the pages that ${this.name} writes cannot be marked: ${proof.reason}`);
      return;
    }
    this.mode = proof.mode;
    this.tracker = this.makeTracker(proof.mode, false);
  }

  /** See StateMover.track. @throws VhostdError */
  async track(wanted: Tracking | undefined, deadline: Deadline): Promise<string | undefined> {
    const mode = await this.tracker?.track(wanted, deadline);
    if (this.tracker === undefined && wanted !== undefined)
      throw new VhostdError("notSupported", `${this.name} cannot mark the pages that it writes`);
    return mode && TRACKING_LABEL[mode];
  }

  onLost(handler: (error: Error) => void): void {
    this.lostHandler = handler;
  }

  /** The device stands still. Never rejects. */
  async finish(deadline: Deadline): Promise<void> {
    await this.tracker?.finish(deadline);
  }

  /** Until this is disposed of nobody looks at what the device has marked. */
  hold(): Disposable {
    return this.tracker?.hold() ?? { [Symbol.dispose]: () => {} };
  }

  /** The device begins or has begun to run. Never rejects. */
  async confirm(deadline: Deadline): Promise<void> {
    if (!this.unsure) return;
    this.unsure = false;
    await this.tracker?.confirm(deadline);
  }

  /** The device was reset, and is at rest. Never rejects. */
  async wasReset(deadline: Deadline): Promise<void> {
    this.unsure = true;
    await this.tracker?.finish(deadline, true);
    await this.quiet();
  }

  /** The device is at rest. Never rejects. */
  async quiet(): Promise<void> {
    await this.tracker?.quiet();
  }

  snapshot(): Pick<MoverSnapshot, "tracking"> {
    return this.mode === undefined ? {} : { tracking: this.mode };
  }

  abandon(): void {
    this.tracker?.abandon();
  }

  private makeTracker(mode: TrackingModeName, left: boolean): DirtyTracker | undefined {
    const { tracking } = this.vf;
    if (tracking === undefined) return undefined;
    const tracker = new DirtyTracker(this.host(tracking), mode, left);
    tracker.onLost((error) => this.lostHandler(error));
    return tracker;
  }

  private host({ modes, memory, log }: TrackingMeans): TrackerHost {
    const { admin, vdevId } = this.vf;
    return {
      name: this.name,
      modes,
      commands: admin.dirtyPages,
      vdevId,
      memory,
      settled: () => !admin.queue.mayStillAlter(vdevId),
      onDead: (handler) => admin.queue.onDead(handler),
      log,
    };
  }
}
