import { both } from "../../base/both.ts";
import { Deadline } from "../../base/deadline.ts";
import { asError, VhostdError } from "../../base/errors.ts";
import { configValues } from "../config-space.ts";
import { type DeviceState, enabledQueues, type QueueState, withEnabled } from "../device-state.ts";
import { compare, decodeDeviceState, encodeDeviceState } from "../device-state-codec.ts";
import { Status } from "../features.ts";
import type {
  FreezeMode,
  MoverCapabilities,
  MoverHost,
  MoverSnapshot,
  StartSteps,
  StateMover,
  TakenUp,
  TakeUp,
} from "../mover.ts";
import { describeStatus, type VirtioPciDevice } from "../pci-device.ts";
import { availIndex, type RingMemory, usedIndex } from "../split-ring.ts";

/** Milliseconds between two looks at a ring that drains. */
const DRAIN_INTERVAL = 1;

/** Milliseconds to bring the device to rest where the caller's deadline may have passed. */
const CLEAN_UP_TIMEOUT = 5000;

/** `frozen`: drained and left configured, with no doorbell rung any more. `starting`: on the way to running. */
type State =
  | { readonly kind: "reset" }
  | { readonly kind: "starting" | "running" | "frozen"; readonly state: DeviceState };

/**
 * Moves the state of a VF that nobody manages: with its own registers only. A virtio reset clears the ring indices, and
 * no register sets them, so a stopped VF is drained and left configured ("frozen"); a start with the same rings at the
 * same indices continues it, and any other start is a reset that can only begin at index 0. Receive queues are not
 * drained: the device keeps their buffers and is kept from memory, of which a guest that is reset makes other use.
 */
export class RegistersMover implements StateMover {
  readonly kind = "registers";
  readonly capabilities: MoverCapabilities = { resumeAnywhere: false, dirtyTracking: false };
  private readonly device: VirtioPciDevice;
  private current: State;
  /** An earlier process may have been telling the device of other queues when it died. */
  private unsure = false;

  /** @throws VhostdError invalid where the snapshot of an earlier process is malformed */
  constructor(
    private readonly host: MoverHost,
    snapshot: MoverSnapshot = { kind: "reset" },
  ) {
    this.device = host.device;
    this.current = snapshot.kind === "reset" ? snapshot : { ...snapshot, state: decodeDeviceState(snapshot.state) };
  }

  async configure(wanted: DeviceState, deadline: Deadline, steps: StartSteps = {}): Promise<void> {
    const { connect = nothing, note = nothing } = steps;
    try {
      // Its registers answer behind what was said before: all is connected when it begins to run.
      await both(connect(), this.bringIn(wanted, deadline, note));
    } catch (error) {
      if (this.current.kind === "running") await this.resetUnstarted();
      throw error;
    }
  }

  private async bringIn(wanted: DeviceState, deadline: Deadline, note: () => Promise<void>): Promise<void> {
    const frozen = await this.continued(wanted, deadline);
    if (frozen === undefined) {
      await this.reset(deadline);
      for (const queue of wanted.queues) this.checkBase(queue);
    }
    this.current = { kind: "starting", state: wanted };
    const noted = note();
    noted.catch(nothing);
    try {
      await deadline.race(frozen === undefined ? this.program(wanted, noted) : noted.then(() => this.goOn()));
      if (frozen === undefined || !sameEnabled(frozen, wanted)) await this.sendCommands(wanted, deadline);
    } catch (error) {
      await this.resetUnstarted();
      throw error;
    }
    this.unsure = false;
    this.current = { kind: "running", state: wanted };
  }

  async takeUp(deadline: Deadline, { connect = nothing }: TakeUp): Promise<TakenUp> {
    const { current } = this;
    if (current.kind === "reset" || current.kind === "frozen") return "asRecorded";
    const { kind, state } = current;
    // One that begins at 0 has been reset before: it has all that it needs only where it was told to run.
    const wasStanding = kind === "running" || !state.queues.every(isAtZero);
    const status = await deadline.race(this.device.status()).catch(() => undefined);
    if (status === undefined && kind === "running") return "asRecorded";
    try {
      const runs = status !== undefined && (status & Status.driverOk) !== 0;
      if (!runs && !(wasStanding && (await deadline.race(this.stands(state))))) {
        await this.resetUnstarted();
        return wasStanding ? "reset" : "asRecorded";
      }
      if (!runs) await connect();
      // It may have been kept from memory by a stop that nobody has ended.
      if (!runs || state.queues.some((queue) => this.mayMoveOn(queue))) await deadline.race(this.goOn());
      if (kind === "starting") await this.sendCommands(state, deadline);
    } catch (error) {
      this.host.log(`it could not be taken up: ${asError(error).message}`);
      await this.resetUnstarted();
      return kind === "starting" ? "asRecorded" : "reset";
    }
    this.unsure = kind === "running";
    this.current = { kind: "running", state };
    return "asRecorded";
  }

  private resetUnstarted(): Promise<void> {
    return this.reset(Deadline.after(CLEAN_UP_TIMEOUT, `reset of ${this.name}, which did not start`));
  }

  async freeze(memory: RingMemory, _mode: FreezeMode, deadline: Deadline): Promise<DeviceState> {
    const { current } = this;
    if (current.kind === "frozen") return current.state;
    if (current.kind !== "running") throw new VhostdError("invalid", `${this.name} is not running`);
    const draining = current.state.queues.filter((queue) => !this.mayMoveOn(queue));
    await this.drain(draining, (queue) => undrained(queue, memory), deadline);
    if (draining.length < current.state.queues.length) await deadline.race(this.device.setBusMaster(false));
    const queues = current.state.queues.map(({ inFlight: _, ...queue }) => {
      const used = usedIndex(memory, queue);
      return { ...queue, lastAvail: used, lastUsed: used };
    });
    const state = { ...current.state, queues };
    this.current = { kind: "frozen", state };
    return state;
  }

  async enable(queues: ReadonlySet<number>, memory: RingMemory, deadline: Deadline): Promise<void> {
    const { current } = this;
    if (current.kind !== "running") throw new VhostdError("invalid", `${this.name} is not running`);
    const state = withEnabled(current.state, queues);
    if (!sameEnabled(current.state, state)) {
      await this.checkServed(current.state, state, deadline);
      // What it does not use it would not give back.
      if (this.unsure) await this.sendCommands(current.state, deadline);
      this.unsure = false;
      await this.giveBack(current.state, queues, memory, deadline);
      await this.sendCommands(state, deadline);
    }
    this.current = { kind: "running", state };
  }

  async reset(deadline: Deadline): Promise<void> {
    await this.device.reset(deadline);
    this.current = { kind: "reset" };
  }

  snapshot(): MoverSnapshot {
    const { current } = this;
    return current.kind === "reset" ? current : { kind: current.kind, state: encodeDeviceState(current.state) };
  }

  /**
   * The state in which the device stands, stopped, where that is exactly where `wanted` begins. Its configuration space is
   * its own matter.
   */
  private async continued(wanted: DeviceState, deadline: Deadline): Promise<DeviceState | undefined> {
    const { current } = this;
    if (current.kind !== "frozen") return undefined;
    const { state } = current;
    // Rings that a driver has just made look like those of a device that did nothing. A reset is right for both.
    if (wanted.queues.every(isAtZero)) return undefined;
    const queues = state.queues.map((queue) => (this.mayMoveOn(queue) ? movedOn(queue, wanted) : queue));
    const seen = withEnabled({ ...state, config: wanted.config, queues }, new Set(enabledQueues(wanted)));
    if (compare(seen, wanted).length > 0) return undefined;
    if ((await this.unserved(state, wanted, deadline)) !== undefined) return undefined;
    return (await deadline.race(this.stands(wanted))) ? state : undefined;
  }

  /**
   * Whether the device is as it was left. One that loses bus mastering may take DRIVER_OK back (QEMU's do): as long as it
   * has its features and its queues it was not reset, and only a reset clears the indices of rings (2.4).
   */
  private async stands(wanted: DeviceState): Promise<boolean> {
    const status = await this.device.status();
    if (status === wanted.status) return true;
    if (status !== (wanted.status & ~Status.driverOk)) return false;
    for (const index of enabledQueues(wanted)) if (!(await this.device.isEnabled(index))) return false;
    return true;
  }

  /** The device may reach memory again. */
  private async goOn(): Promise<void> {
    await this.device.setBusMaster(true);
    if (((await this.device.status()) & Status.driverOk) === 0) await this.device.run();
  }

  /** VIRTIO 1.2, 3.1.1, steps 2 to 8. A queue that is disabled is set up like the others. */
  private async program(wanted: DeviceState, noted: Promise<void>): Promise<void> {
    const control = this.host.control();
    const queues = control === undefined ? wanted.queues : [...wanted.queues, control.begin()];
    await this.device.negotiate(wanted.features);
    await this.device.setUpQueues(wanted.configVector, queues);
    await noted;
    await this.device.run();
  }

  /**
   * Tells the device by its own control queue which queues are in use.
   * @throws VhostdError notSupported where it refuses; what the control queue throws
   */
  private async sendCommands(state: DeviceState, deadline: Deadline): Promise<void> {
    const { deviceClass, features } = this.host;
    const control = this.host.control();
    if (control === undefined || deviceClass.control === undefined) return;
    // Its PF may have set it up, which does without this queue.
    if (!(await deadline.race(this.device.isEnabled(control.index)))) return;
    const config = configValues(deviceClass.configSpace, state.config);
    for (const command of deviceClass.control.commands({ queues: enabledQueues(state), config, features })) {
      if (await control.command(command, deadline)) continue;
      const refusal = `${this.name} refused ${command.name} on its control queue`;
      if (command.optional !== true) throw new VhostdError("notSupported", refusal);
      this.host.log(refusal);
    }
  }

  /**
   * Who restores a state sets up only the queues that are in use then, and the registers set up none on a device that runs.
   * @returns a queue that is newly wanted and was not set up
   */
  private async unserved(now: DeviceState, wanted: DeviceState, deadline: Deadline): Promise<number | undefined> {
    const known = new Set(enabledQueues(now));
    for (const queue of enabledQueues(wanted)) {
      if (!known.has(queue) && !(await deadline.race(this.device.isEnabled(queue)))) return queue;
    }
    return undefined;
  }

  /** @throws VhostdError notSupported */
  private async checkServed(now: DeviceState, wanted: DeviceState, deadline: Deadline): Promise<void> {
    const queue = await this.unserved(now, wanted, deadline);
    if (queue === undefined) return;
    throw new VhostdError(
      "notSupported",
      `queue ${queue} cannot be enabled: ${this.name} was set up without it, and only its PF or a reset could change that`,
      { fix: "restart the guest's driver (reboot the guest)", data: { queue } },
    );
  }

  /** The device may use buffers of this queue also while it is stopped: it is not waited for. */
  private mayMoveOn({ index, disabled }: QueueState): boolean {
    return disabled === true || this.receives(index);
  }

  private receives(queue: number): boolean {
    return this.host.deviceClass.receives?.(queue) === true;
  }

  /** Waits for what was made available on queues that are not to be used any more; what comes later stays there. */
  private async giveBack(state: DeviceState, kept: ReadonlySet<number>, memory: RingMemory, deadline: Deadline) {
    const ended = state.queues.filter((queue) => !kept.has(queue.index) && !this.mayMoveOn(queue));
    const ends = new Map(ended.map((queue) => [queue.index, availIndex(memory, queue)]));
    const look = (queue: QueueState) => {
      const left = (ends.get(queue.index)! - usedIndex(memory, queue)) & 0xffff;
      const passed = left === 0 || left > queue.size;
      return passed ? undefined : `queue ${queue.index} has ${left} buffers in use`;
    };
    await this.drain(ended, look, deadline);
  }

  /**
   * @param look says what the device has not given back of a queue
   * @throws VhostdError timedOut with what `look` says; io where the device never will, or what `look` throws
   */
  private async drain(
    queues: readonly QueueState[],
    look: (queue: QueueState) => string | undefined,
    deadline: Deadline,
  ): Promise<void> {
    // What became available after the last signal that the relay passed on.
    await Promise.all(queues.map(({ index }) => this.host.ringDoorbell(index)));
    let reason = "";
    try {
      await deadline.poll(async () => {
        const status = await deadline.race(this.device.status());
        if ((status & Status.needsReset) !== 0 || (status & Status.driverOk) === 0) {
          throw new VhostdError("io", `${this.name} stopped by itself: ${describeStatus(status)}`);
        }
        reason = queues.map(look).find((left) => left !== undefined) ?? "";
        return reason === "" ? true : undefined;
      }, DRAIN_INTERVAL);
    } catch (cause) {
      if (!(cause instanceof VhostdError && cause.code === "timedOut")) throw cause;
      throw new VhostdError("timedOut", `${cause.message}: ${reason}`, { cause });
    }
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

  private get name(): string {
    return this.device.fn.address;
  }
}

async function nothing(): Promise<void> {}

/**
 * @returns why the device still uses this ring, or undefined when every buffer is written back
 * @throws VhostdError io where it never will
 */
function undrained(queue: QueueState, memory: RingMemory): string | undefined {
  const used = usedIndex(memory, queue);
  const available = availIndex(memory, queue);
  // The device goes on meanwhile: only indices of one moment can be compared.
  if (usedIndex(memory, queue) !== used) return `queue ${queue.index} is still being used`;
  const left = (available - used) & 0xffff;
  if (left > queue.size) {
    throw new VhostdError("io", `queue ${queue.index} has ${left} entries in use, of ${queue.size}: a broken ring`);
  }
  return left === 0
    ? undefined
    : `queue ${queue.index} has ${left} buffers in use (available ${available}, used ${used})`;
}

/**
 * The queue at the indices of `wanted`. The device knows its own better than anyone: a guest that runs while its device is
 * stopped has had any number of buffers used since.
 */
function movedOn(queue: QueueState, { queues }: DeviceState): QueueState {
  const next = queues.find(({ index }) => index === queue.index);
  return next === undefined ? queue : { ...queue, lastAvail: next.lastAvail, lastUsed: next.lastUsed };
}

function isAtZero({ lastAvail, lastUsed }: QueueState): boolean {
  return lastAvail === 0 && lastUsed === 0;
}

function sameEnabled(a: DeviceState, b: DeviceState): boolean {
  return enabledQueues(a).join() === enabledQueues(b).join();
}
