import { Deadline } from "../../base/deadline.ts";
import { asError, VhostdError } from "../../base/errors.ts";
import type { InternalStatusName } from "../admin/vendor.ts";
import { type DeviceState, enabledQueues } from "../device-state.ts";
import { decodeDeviceState } from "../device-state-codec.ts";
import type { MoverHost, MoverSnapshot } from "../mover.ts";
import type { ManagedVf } from "./vendor.ts";
import { type InternalSteps, isImpatience } from "./vendor-steps.ts";

/** Milliseconds between two times that a PF is asked: the first, and the longest. */
const INTERVAL = { first: 250, longest: 30_000 } as const;
/** Milliseconds for an answer, and for the device to go on then. */
const LOOK_TIMEOUT = 5_000;

/** A device that should run, and that an earlier process may have been stopping. */
export interface LateTask {
  readonly host: Pick<MoverHost, "device" | "ringDoorbell" | "log" | "failed">;
  readonly vf: ManagedVf;
  readonly steps: InternalSteps;
  position(): MoverSnapshot;
  /** It cannot be asked now. */
  isBlocked(): boolean;
  /** From where it stands still. @throws where it does not */
  goOn(found: InternalStatusName, running: DeviceState, deadline: Deadline): Promise<void>;
}

/**
 * Whether an earlier process has left a device standing still, where nobody could say so when it was taken up: its PF is
 * asked again until it answers, and the device goes on then.
 */
export class LateLook {
  private isOpen = false;
  private holds = 0;
  private interval: number = INTERVAL.first;
  private timer: ReturnType<typeof setTimeout> | undefined;
  private underWay: Deadline | undefined;
  /** The device is being changed. Never rejects. */
  private change: Promise<void> | undefined;

  constructor(private readonly task: LateTask) {}

  /** It is not known whether the device stands still. */
  get mayStand(): boolean {
    return this.isOpen;
  }

  begin(): void {
    this.isOpen = true;
    this.lookLater();
    if (!this.isOpen) return;
    this.task.host.log(
      "its PF does not say whether an earlier process left it standing still; it is asked until it does, and the VF goes on then",
    );
  }

  /** It is known. */
  end(): void {
    this.isOpen = false;
    clearTimeout(this.timer);
  }

  /** As end, and what is under way fails. */
  abort(): void {
    this.end();
    this.underWay?.shorten(0);
  }

  /**
   * Resolves when the device is not being changed from here; until the result is disposed of it is not.
   * @throws VhostdError timedOut
   */
  async hold(deadline: Deadline): Promise<Disposable> {
    this.holds++;
    clearTimeout(this.timer);
    const held = {
      [Symbol.dispose]: () => {
        this.holds--;
        this.lookLater();
      },
    };
    using undo = new DisposableStack();
    undo.use(held);
    if (this.change !== undefined) await deadline.race(this.change);
    undo.move();
    return held;
  }

  /** What it should run with; undefined where it should not, or nobody will ever say it. */
  private get running(): DeviceState | undefined {
    const { task } = this;
    const position = task.position();
    const isDead = task.vf.admin.queue.state.kind === "dead";
    return position.kind === "running" && !isDead ? decodeDeviceState(position.state) : undefined;
  }

  private lookLater(): void {
    clearTimeout(this.timer);
    if (this.isOpen && this.running === undefined) this.end();
    if (!this.isOpen || this.holds > 0 || this.underWay !== undefined) return;
    this.timer = setTimeout(() => void this.look(), this.interval);
    this.timer.unref();
    this.interval = Math.min(2 * this.interval, INTERVAL.longest);
  }

  /** Never rejects. */
  private async look(): Promise<void> {
    const { task } = this;
    const deadline = Deadline.after(LOOK_TIMEOUT, `going on of ${task.host.device.fn.address}`);
    this.underWay = deadline;
    const found = task.isBlocked() ? undefined : await task.steps.ask(deadline);
    const { running } = this;
    // Who holds it may have changed it since.
    if (found !== undefined && running !== undefined && this.isOpen && this.holds === 0) {
      this.change = this.settle(found, running, deadline);
      await this.change;
      this.change = undefined;
    }
    this.underWay = undefined;
    this.lookLater();
  }

  private async settle(found: InternalStatusName, running: DeviceState, deadline: Deadline): Promise<void> {
    const { task } = this;
    const { host } = task;
    try {
      if (found === "quiesced" || found === "freezed") {
        await task.goOn(found, running, deadline);
        await deadline.race(Promise.all(enabledQueues(running).map((queue) => host.ringDoorbell(queue))));
        host.log("an earlier process left it standing still: it goes on");
      }
      this.end();
    } catch (cause) {
      if (!this.isOpen || isSilence(cause)) return;
      this.end();
      const why = `an earlier process left it standing still, and it does not go on: ${asError(cause).message}`;
      host.failed(new VhostdError("io", why, { cause }));
    }
  }
}

/** Nothing was said that would hold for good. */
function isSilence(error: unknown): boolean {
  if (isImpatience(error)) return true;
  const codes = [error, asError(error).cause].map((one) => (one instanceof VhostdError ? one.code : undefined));
  return codes.includes("timedOut") || codes.includes("busy");
}
