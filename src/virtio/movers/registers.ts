import { Deadline } from "../../base/deadline.ts";
import { VhostdError } from "../../base/errors.ts";
import type { DeviceState, QueueState } from "../device-state.ts";
import { compare, decodeDeviceState, encodeDeviceState } from "../device-state-codec.ts";
import { Status } from "../features.ts";
import type { FreezeMode, MoverCapabilities, MoverHost, MoverSnapshot, StateMover } from "../mover.ts";
import { describeStatus, type VirtioPciDevice } from "../pci-device.ts";
import { availIndex, type RingMemory, usedIndex } from "../split-ring.ts";

/** Milliseconds between two looks at a ring that drains. */
const DRAIN_INTERVAL = 1;

/** Milliseconds to bring the device to rest where the caller's deadline may have passed. */
const CLEAN_UP_TIMEOUT = 5000;

/** `frozen`: drained and left configured, with no doorbell rung any more. */
type State =
  | { readonly kind: "reset" }
  | { readonly kind: "running"; readonly state: DeviceState }
  | { readonly kind: "frozen"; readonly state: DeviceState };

/**
 * Moves the state of a VF that nobody manages: with its own registers only. A virtio reset clears the ring indices, and
 * no register sets them, so a stopped VF is drained and left configured ("frozen"); a start with the same rings at the
 * same indices continues it, and any other start is a reset that can only begin at index 0.
 */
export class RegistersMover implements StateMover {
  readonly kind = "registers";
  readonly capabilities: MoverCapabilities = { resumeAnywhere: false, dirtyTracking: false };
  private readonly device: VirtioPciDevice;
  private current: State;

  /** @throws VhostdError invalid where the snapshot of an earlier process is malformed */
  constructor(
    private readonly host: Pick<MoverHost, "device" | "ringDoorbell">,
    snapshot: MoverSnapshot = { kind: "reset" },
  ) {
    this.device = host.device;
    this.current = snapshot.kind === "reset" ? snapshot : { ...snapshot, state: decodeDeviceState(snapshot.state) };
  }

  async configure(wanted: DeviceState, deadline: Deadline): Promise<void> {
    if (await this.continues(wanted, deadline)) {
      this.current = { kind: "running", state: wanted };
      return;
    }
    await this.reset(deadline);
    for (const queue of wanted.queues) this.checkBase(queue);
    try {
      await deadline.race(this.program(wanted));
    } catch (error) {
      await this.reset(Deadline.after(CLEAN_UP_TIMEOUT, `reset of ${this.name}, which did not start`));
      throw error;
    }
    this.current = { kind: "running", state: wanted };
  }

  async freeze(memory: RingMemory, _mode: FreezeMode, deadline: Deadline): Promise<DeviceState> {
    const { current } = this;
    if (current.kind === "frozen") return current.state;
    if (current.kind === "reset") throw new VhostdError("invalid", `${this.name} is not running`);
    // What became available after the last signal that the relay passed on.
    await Promise.all(current.state.queues.map(({ index }) => this.host.ringDoorbell(index)));
    let reason = "";
    try {
      await deadline.poll(async () => {
        reason = (await this.undrained(current.state, memory, deadline)) ?? "";
        return reason === "" ? true : undefined;
      }, DRAIN_INTERVAL);
    } catch (cause) {
      if (!(cause instanceof VhostdError && cause.code === "timedOut")) throw cause;
      throw new VhostdError("timedOut", `${cause.message}: ${reason}`, { cause });
    }
    const queues = current.state.queues.map(({ inFlight: _, ...queue }) => {
      const used = usedIndex(memory, queue);
      return { ...queue, lastAvail: used, lastUsed: used };
    });
    const state = { ...current.state, queues };
    this.current = { kind: "frozen", state };
    return state;
  }

  async reset(deadline: Deadline): Promise<void> {
    await this.device.reset(deadline);
    this.current = { kind: "reset" };
  }

  snapshot(): MoverSnapshot {
    const { current } = this;
    return current.kind === "reset" ? current : { kind: current.kind, state: encodeDeviceState(current.state) };
  }

  /** Whether the device stands, stopped, exactly where `wanted` begins. Its configuration space is its own matter. */
  private async continues(wanted: DeviceState, deadline: Deadline): Promise<boolean> {
    const { current } = this;
    if (current.kind !== "frozen") return false;
    if (compare({ ...current.state, config: wanted.config }, wanted).length > 0) return false;
    return (await deadline.race(this.device.status())) === wanted.status;
  }

  /** VIRTIO 1.2, 3.1.1, steps 2 to 8. */
  private async program(wanted: DeviceState): Promise<void> {
    await this.device.negotiate(wanted.features);
    await this.device.setUpQueues(wanted.configVector, wanted.queues);
    await this.device.run();
  }

  private checkBase({ index, lastAvail, lastUsed }: QueueState): void {
    if (lastAvail === 0 && lastUsed === 0) return;
    const at = lastAvail === lastUsed ? `${lastAvail}` : `${lastAvail} (used ${lastUsed})`;
    throw new VhostdError(
      "notSupported",
      `queue ${index} is to resume at index ${at}, but ${this.name} was reset and can only begin at 0`,
      {
        fix: "restart the guest's driver (reboot the guest), or use a VF whose PF can restore its state",
        data: { queue: index, lastAvail, lastUsed },
      },
    );
  }

  /**
   * @returns why the device still uses its rings, or undefined when every buffer is written back
   * @throws VhostdError io where it never will
   */
  private async undrained(state: DeviceState, memory: RingMemory, deadline: Deadline): Promise<string | undefined> {
    const status = await deadline.race(this.device.status());
    if ((status & Status.needsReset) !== 0 || (status & Status.driverOk) === 0) {
      throw new VhostdError("io", `${this.name} stopped by itself: ${describeStatus(status)}`);
    }
    for (const queue of state.queues) {
      const used = usedIndex(memory, queue);
      const available = availIndex(memory, queue);
      // The device goes on meanwhile: only indices of one moment can be compared.
      if (usedIndex(memory, queue) !== used) return `queue ${queue.index} is still being used`;
      const left = (available - used) & 0xffff;
      if (left > queue.size) {
        throw new VhostdError("io", `queue ${queue.index} has ${left} entries in use, of ${queue.size}: a broken ring`);
      }
      if (left > 0) return `queue ${queue.index} has ${left} buffers in use (available ${available}, used ${used})`;
    }
    return undefined;
  }

  private get name(): string {
    return this.device.fn.address;
  }
}
