import { Deadline } from "../base/deadline.ts";
import { type LogPlace, type LogRange, mapSize, type RingLog } from "../native/ring-log.ts";
import { TRACKING_KIND, type TrackingModeName } from "../virtio/admin/vendor.ts";
import { AdminError, inAdminTerms } from "./admin-error.ts";

/** Milliseconds for a worker's piece of I/O: the administrator is told to try again sooner than a driver gives up. */
const TURN_TIMEOUT = 5000;

/** What the administrator wants to be marked, and how. */
export interface TrackingPlan {
  readonly mode: TrackingModeName;
  readonly range: LogRange;
  /** Of the map in the PF's memory, in push modes: at least as large as it must be. */
  readonly places: readonly LogPlace[];
}

/**
 * The pages that one VF writes, as the PF's administrator has them tracked: one range at a time, whatever the status of
 * the VF. Commands come one after the other; a reset of the PF, which ends it, comes any time.
 */
export class VfTracker {
  private current: TrackingPlan | undefined;
  /** Resets of the PF so far: a start that lasted so long is none. */
  private epoch = 0;

  /** @param pf in whose memory maps are */
  constructor(
    private readonly log: Pick<RingLog, "start" | "stop" | "cut" | "loss" | "take">,
    private readonly pf: RingLog,
  ) {}

  /** @throws AdminError dataTransfer where the map is not in the PF's memory */
  async start(plan: TrackingPlan): Promise<void> {
    if (this.current !== undefined) {
      throw new AdminError("error", `${describe(this.current)} is tracked already, and one range can be`);
    }
    const { epoch } = this;
    const { form, push } = TRACKING_KIND[plan.mode];
    const lent = push ? { places: plan.places, from: this.pf } : undefined;
    await inAdminTerms(async () => {
      await this.log.start(form, plan.range, lent, () => epoch === this.epoch, turnDeadline());
      if (epoch === this.epoch) this.current = plan;
    });
  }

  /** What was written before is marked when it resolves. @throws AdminError */
  async stop(address: number): Promise<void> {
    const { range } = this.current ?? {};
    // The vendor's software names the end of the memory that is tracked, and devices take that.
    this.tracked(address === (range && range.address + range.length) ? range!.address : address);
    const { epoch } = this;
    await inAdminTerms(() => this.log.stop(turnDeadline()));
    if (epoch === this.epoch) this.current = undefined;
  }

  /** Bytes of map to be reported. @throws AdminError internal where not all is marked any more */
  pending(address: number): number {
    const { mode, range } = this.whole(address);
    const { form, push } = TRACKING_KIND[mode];
    return push ? 0 : mapSize(form, range);
  }

  /** A part of the map, which is cleared. @throws AdminError */
  report(address: number, offset: number, length: number): Uint8Array {
    const { mode, range } = this.whole(address);
    const { form, push } = TRACKING_KIND[mode];
    if (push)
      throw new AdminError("error", `${describe(this.current!)} is tracked in memory of the PF: nothing is reported`);
    const size = mapSize(form, range);
    if (offset + length > size) {
      throw new AdminError("dataTransfer", `${length} bytes at ${offset} of a map of ${size}`);
    }
    return this.log.take(offset, length);
  }

  /** The PF was reset. */
  forget(): void {
    this.epoch++;
    this.current = undefined;
    this.log.cut("the PF was reset");
  }

  private whole(address: number): TrackingPlan {
    const plan = this.tracked(address);
    const { loss } = this.log;
    if (loss !== undefined) throw new AdminError("internal", `not all pages are marked any more: ${loss}`);
    return plan;
  }

  private tracked(address: number): TrackingPlan {
    const { current } = this;
    if (current?.range.address === address) return current;
    const what = current === undefined ? "nothing is" : `${describe(current)} is`;
    throw new AdminError("error", `no range at 0x${address.toString(16)} is tracked; ${what}`);
  }
}

function describe({ range: { address, length } }: TrackingPlan): string {
  return `0x${address.toString(16)}+0x${length.toString(16)}`;
}

function turnDeadline(): Deadline {
  return Deadline.after(TURN_TIMEOUT, "the ring worker's piece of I/O");
}
