import { Deadline } from "../base/deadline.ts";
import { asError, VhostdError } from "../base/errors.ts";
import type { RingConfig, RingEngine } from "../native/ring-engine.ts";
import { INTERNAL_STEPS, type InternalStatusName } from "../virtio/admin/vendor.ts";

/** Milliseconds for a worker to let go: one piece of I/O, or the system's flush of a file. */
const STOP_TIMEOUT = 30_000;
/** Milliseconds for a worker to be frozen: the administrator is told to try again sooner than a driver gives up. */
const FREEZE_TIMEOUT = 5000;
/** Milliseconds for everything that was taken to be given back, before the administrator is told to try again. */
const DRAIN_TIMEOUT = 5000;
/** Milliseconds to find the worker between two pieces of I/O. */
const LOOK_TIMEOUT = 1000;
const INTERVAL = 1;

/** Where a ring lies, as its driver has said. */
export type RingPlace = Pick<RingConfig, "size" | "desc" | "driver" | "device">;

/** What the service has to know of its device. */
export interface ServedDevice {
  /** The driver wants its rings served, the function may reach memory, and nothing is broken. */
  readonly serveable: boolean;
  readonly driverFeatures: bigint;
  place(queue: number): RingPlace;
  fail(reason: string): void;
  /** What the rings had taken is not completed any more; what of it a frozen ring lists is taken again. */
  dropped(): void;
}

/**
 * When the rings of a function are served: its driver's wishes and the internal status, which the PF's administrator
 * changes. A driver alone never notices the latter. All that changes something is called one after the other.
 *
 * | status | |
 * |---|---|
 * | init | after a reset; DRIVER_OK leads to running |
 * | running | rings are served while the driver lets them |
 * | quiesced | no further chain is taken; those that were go on |
 * | freezed | the worker is parked, nothing of the state changes |
 */
export class RingService {
  /** Resets so far: whoever waited while one came is too late. */
  resets = 0;
  private current: InternalStatusName = "init";
  private worker: "stopped" | "running" | "parking" = "stopped";
  /** Rings of a frozen function that the engine was made to forget, because memory under them went away. */
  private readonly kept = new Map<number, RingConfig>();

  constructor(
    private readonly engine: RingEngine,
    private readonly device: ServedDevice,
  ) {}

  get status(): InternalStatusName {
    return this.current;
  }

  /** The driver is ready. @throws VhostdError timedOut */
  async onDriverOk(): Promise<void> {
    if (this.current === "init") this.current = "running";
    await this.update();
  }

  /** Brings the worker to what driver and status want. @throws VhostdError timedOut while it hangs in the disk */
  async update(deadline = stopDeadline()): Promise<void> {
    const serve = this.device.serveable && this.current !== "freezed";
    if (serve === (this.worker === "running")) return;
    if (this.worker !== "stopped") {
      this.worker = "parking";
      await this.engine.park(deadline);
      this.worker = "stopped";
    }
    if (!serve) return;
    try {
      this.engine.start(this.device.driverFeatures);
      this.worker = "running";
    } catch (error) {
      this.device.fail(asError(error).message);
    }
  }

  /**
   * One step of the internal status.
   * @returns the status before
   * @throws VhostdError notPermitted where it is no legal step, timedOut, invalid where rings are not mapped any more;
   * the status is what it was then
   */
  async change(to: InternalStatusName): Promise<InternalStatusName> {
    const from = this.current;
    if (!INTERNAL_STEPS[from].includes(to))
      throw new VhostdError("notPermitted", `no step leads from ${from} to ${to}`);
    switch (to) {
      case "running":
        await this.become(to);
        this.engine.unquiesce();
        break;
      case "quiesced":
        if (from === "freezed") await this.reattach();
        else await this.engine.quiesce();
        try {
          await this.become(to);
        } catch (error) {
          if (from !== "freezed") this.engine.unquiesce();
          throw error;
        }
        break;
      default:
        await this.become(to, Deadline.after(FREEZE_TIMEOUT, "the ring worker's piece of I/O"));
    }
    return from;
  }

  /**
   * Everything that was taken is given back, or nothing goes on anyway. Called beside other changes.
   * @throws VhostdError timedOut; cancelled where the function was reset meanwhile
   */
  async drained(): Promise<void> {
    const { resets } = this;
    await Deadline.after(DRAIN_TIMEOUT, "what was taken").poll(() => {
      if (resets !== this.resets) throw new VhostdError("cancelled", "the function was reset meanwhile");
      return this.worker !== "running" || !this.device.serveable || this.engine.inFlight() === 0 || undefined;
    }, INTERVAL);
  }

  /** Where the rings stand, by queue. @throws VhostdError timedOut while the worker is in one piece of I/O */
  async rings(): Promise<ReadonlyMap<number, RingConfig>> {
    const rings = await Deadline.after(LOOK_TIMEOUT, "the ring worker's piece of I/O").poll(
      () => this.look(),
      INTERVAL,
    );
    return new Map([
      ...this.kept,
      ...rings.map(({ queue, ...indices }) => [queue, { ...this.device.place(queue), ...indices }] as const),
    ]);
  }

  /**
   * Other rings take the place of all that there are. Only while freezed.
   * @throws VhostdError invalid with the reason; nothing has changed then
   */
  async replace(rings: ReadonlyMap<number, RingConfig>, features: bigint): Promise<void> {
    await this.detach();
    await this.attach(rings, features);
    this.kept.clear();
  }

  /** What a frozen function knows of its rings does not need their memory. */
  async beforeUnmap(): Promise<void> {
    if (this.current === "freezed") await this.detach();
  }

  /** No rings, no driver. @throws VhostdError timedOut while the worker hangs in the disk */
  async reset(): Promise<void> {
    this.resets++;
    await this.drop();
    this.engine.unquiesce();
    this.kept.clear();
    this.worker = "stopped";
    this.current = "init";
  }

  /** @throws what `update` does; the status is what it was then */
  private async become(to: InternalStatusName, deadline?: Deadline): Promise<void> {
    const from = this.current;
    this.current = to;
    try {
      await this.update(deadline);
    } catch (error) {
      this.current = from;
      throw error;
    }
  }

  private look() {
    try {
      return this.engine.rings();
    } catch (error) {
      if (error instanceof VhostdError && error.code === "busy") return undefined;
      throw error;
    }
  }

  private async reattach(): Promise<void> {
    if (this.kept.size === 0) return;
    await this.detach();
    await this.attach(this.kept, this.device.driverFeatures);
    this.kept.clear();
  }

  /** The engine knows no ring afterwards, `kept` all. The worker is parked. */
  private async detach(): Promise<void> {
    for (const [queue, ring] of await this.rings()) this.kept.set(queue, ring);
    await this.drop();
  }

  /** All of them, or none. */
  private async attach(rings: ReadonlyMap<number, RingConfig>, features: bigint): Promise<void> {
    let queue = 0;
    try {
      for (const [index, ring] of rings) {
        queue = index;
        await this.engine.activate(index, ring, features);
      }
    } catch (cause) {
      await this.drop();
      throw new VhostdError("invalid", `queue ${queue}: ${asError(cause).message}`, { cause });
    }
  }

  private async drop(): Promise<void> {
    await this.engine.stop("drop", stopDeadline());
    this.device.dropped();
  }
}

function stopDeadline(): Deadline {
  return Deadline.after(STOP_TIMEOUT, "the end of the ring worker");
}
