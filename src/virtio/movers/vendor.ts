import { Deadline } from "../../base/deadline.ts";
import { asError, VhostdError } from "../../base/errors.ts";
import type { VendorState } from "../admin/state-blob.ts";
import { type InternalStatusName, type SettableStatus, stepsTo } from "../admin/vendor.ts";
import { AdminRefusal, type VendorAdmin } from "../admin/vendor-admin.ts";
import {
  checkBases,
  readSaved,
  rewound,
  type SavedState,
  toVendorState,
  undrained,
  withoutReceived,
} from "../admin/vendor-state.ts";
import { comparedBytes } from "../config-space.ts";
import { type DeviceState, withEnabled } from "../device-state.ts";
import { compare, decodeDeviceState, encodeDeviceState } from "../device-state-codec.ts";
import type { FreezeMode, ManualControl, MoverCapabilities, MoverHost, MoverSnapshot, StateMover } from "../mover.ts";
import { describeStatus, type VirtioPciDevice } from "../pci-device.ts";
import type { RingMemory } from "../split-ring.ts";
import { RegistersMover } from "./registers.ts";

/** Milliseconds between two looks at a device that drains: the first, and the longest. */
const DRAIN_INTERVAL = { first: 1, longest: 20 } as const;
/** Milliseconds to bring the device to rest where the caller's deadline may have passed. */
const CLEAN_UP_TIMEOUT = 5000;
/** Milliseconds of a stop, and their part of it at most, that are kept for saying why the device has not drained. */
const REASON_TIME = { most: 3000, share: 1 / 4 } as const;
/** Milliseconds that a quick reset spends at most to learn that it may be quick. */
const ASK_TIMEOUT = 1000;

/** Which VF of a managed PF a mover moves. */
export interface ManagedVf {
  readonly admin: VendorAdmin;
  readonly vdevId: number;
}

type ModeOf = (queue: number) => FreezeMode;

/** `frozen`: freezed, with the state that it had then. */
type State =
  | { readonly kind: "reset" }
  | { readonly kind: "running"; readonly state: DeviceState }
  | { readonly kind: "frozen"; readonly state: DeviceState };

/**
 * Moves the state of a VF through the vendor's admin commands. Ring indices are part of that state, so the VF resumes
 * anywhere. An operator may change its internal status at any time: it is always asked. While the admin queue is dead,
 * or has not answered a command that may still alter the VF, the VF is moved by its registers, which can only drain it
 * and begin at index 0.
 */
export class VendorMover implements StateMover {
  readonly kind = "vendor";
  readonly manual: ManualControl;
  private current: State;
  /** The end of a reset that was not waited for: what went wrong, or undefined. */
  private cleanUp: Promise<Error | undefined> | undefined;
  /** Status 0 was read after the last reset; not known of one that failed or was the task of an earlier process. */
  private atRest = false;
  private registers: RegistersMover | undefined;

  /** @throws VhostdError invalid where the snapshot of an earlier process is malformed */
  constructor(
    private readonly host: MoverHost,
    private readonly vf: ManagedVf,
    snapshot: MoverSnapshot = { kind: "reset" },
  ) {
    this.current = stateOf(snapshot);
    this.manual = {
      status: (deadline) => vf.admin.status(vf.vdevId, deadline),
      change: (to, deadline) => this.changeByHand(to, deadline),
    };
  }

  get capabilities(): MoverCapabilities {
    return { resumeAnywhere: this.obstacle === undefined, dirtyTracking: false };
  }

  configure(wanted: DeviceState, deadline: Deadline): Promise<void> {
    return this.bringUp(wanted, "running", deadline);
  }

  /** @param to where the device is left; what it is given it has taken then */
  private async bringUp(wanted: DeviceState, to: SettableStatus, deadline: Deadline): Promise<void> {
    const registers = await this.settle(deadline);
    this.atRest = false;
    if (registers !== undefined) return this.byRegisters(() => registers.configure(wanted, deadline));
    try {
      checkBases(wanted, this.name);
      if (!(await this.continues(wanted, deadline))) await this.program(wanted, deadline);
      // A device that its registers stopped was kept from memory; where it is to go on it stands only now.
      await deadline.race(this.device.setBusMaster(true));
      await this.step("freezed", "quiesced", deadline);
      await this.step("quiesced", to, deadline);
      const status = await deadline.race(this.device.status());
      if (status !== wanted.status) {
        throw new VhostdError("io", `${this.name} does not run with what was restored: ${describeStatus(status)}`);
      }
    } catch (error) {
      this.current = { kind: "reset" };
      await this.device.reset(Deadline.after(CLEAN_UP_TIMEOUT, `reset of ${this.name}, which did not start`));
      this.atRest = true;
      throw error;
    }
    this.current = { kind: "running", state: wanted };
  }

  async freeze(memory: RingMemory, mode: FreezeMode, deadline: Deadline): Promise<DeviceState> {
    if (this.registers === undefined && this.current.kind === "frozen") return this.current.state;
    const registers = this.fallback();
    if (registers !== undefined) return registers.freeze(memory, mode, deadline);
    const { current } = this;
    if (current.kind === "frozen") return current.state;
    if (current.kind === "reset") throw this.notRunning();
    return this.stop(current.state, memory, () => mode, deadline);
  }

  async enable(queues: ReadonlySet<number>, memory: RingMemory, deadline: Deadline): Promise<void> {
    const registers = this.fallback();
    if (registers !== undefined) {
      return this.byRegisters(() => registers.enable(queues, memory, deadline));
    }
    const { current } = this;
    if (current.kind !== "running") throw this.notRunning();
    if (compare(current.state, withEnabled(current.state, queues)).length === 0) return;
    const { admin, vdevId } = this.vf;
    const found = await admin.status(vdevId, deadline);
    // What an operator holds stays held.
    const to = found === "init" ? "running" : found;
    let state: DeviceState;
    try {
      // What a queue has taken that is not to be used any more would not come back.
      state = await this.stop(current.state, memory, (index) => (queues.has(index) ? "listed" : "drained"), deadline);
    } catch (error) {
      const back = Deadline.after(CLEAN_UP_TIMEOUT, `the way back of ${this.name}`);
      await this.bringTo(to, back).catch(() => {});
      throw error;
    }
    await this.bringUp(withEnabled(state, queues), to, deadline);
  }

  /** Freezes the running device, with all given back that its queues must not keep. */
  private async stop(
    running: DeviceState,
    memory: RingMemory,
    modeOf: ModeOf,
    deadline: Deadline,
  ): Promise<DeviceState> {
    await this.stopFor(running, memory, modeOf, deadline);
    let reason: string | undefined;
    try {
      for (let interval: number = DRAIN_INTERVAL.first; ; interval = Math.min(2 * interval, DRAIN_INTERVAL.longest)) {
        const saved = rewound(await this.save(running, deadline), memory, this.host.deviceClass);
        reason = undrained(saved, memory, modeOf);
        if (reason === undefined) {
          this.current = { kind: "frozen", state: saved.state };
          return saved.state;
        }
        // Freezed it would keep what it has taken.
        await this.bringTo("quiesced", deadline);
        deadline.check();
        await Bun.sleep(Math.min(interval, deadline.remaining));
      }
    } catch (cause) {
      // Time passes while the device is asked, too: what it was that had not drained is the better answer.
      if (reason === undefined || !deadline.expired) throw cause;
      throw new VhostdError("timedOut", `${deadline.error().message}: ${reason}`, { cause });
    }
  }

  /** A device that is freezed uses no memory: the end of its reset is not waited for. */
  async reset(deadline: Deadline): Promise<void> {
    const registers = await this.settle(deadline);
    if (registers !== undefined) return registers.reset(deadline);
    if (this.current.kind === "frozen" && (await this.isFreezed(deadline))) {
      const reset = this.device.reset(Deadline.after(CLEAN_UP_TIMEOUT, `reset of ${this.name}, which was freezed`));
      this.cleanUp = reset.then(() => undefined, asError);
    } else {
      await this.device.reset(deadline);
      this.atRest = true;
    }
    this.current = { kind: "reset" };
  }

  snapshot(): MoverSnapshot {
    if (this.registers !== undefined) return this.registers.snapshot();
    const { current } = this;
    return current.kind === "reset" ? current : { kind: current.kind, state: encodeDeviceState(current.state) };
  }

  /**
   * What an earlier reset left behind is done.
   * @returns what `fallback` does
   * @throws VhostdError resetTimedOut where it cannot be
   */
  private async settle(deadline: Deadline): Promise<RegistersMover | undefined> {
    if (this.cleanUp !== undefined) this.atRest = (await deadline.race(this.cleanUp)) === undefined;
    this.cleanUp = undefined;
    const registers = this.fallback();
    if (registers !== undefined || this.current.kind !== "reset" || this.atRest) return registers;
    const unfinished = (await deadline.race(this.device.status())) !== 0;
    if (unfinished) await this.device.reset(deadline);
    this.atRest = true;
    return undefined;
  }

  /** Who moves the VF while the admin queue cannot. A device that is freezed can only be reset by its registers. */
  private fallback(): RegistersMover | undefined {
    const blocked = this.obstacle !== undefined;
    if (blocked && this.registers === undefined) {
      const snapshot = this.snapshot();
      this.registers = new RegistersMover(this.host, snapshot.kind === "frozen" ? { kind: "reset" } : snapshot);
    } else if (!blocked && this.registers !== undefined) {
      this.current = stateOf(this.registers.snapshot());
      this.registers = undefined;
    }
    return this.registers;
  }

  /** @throws what the registers mover does; where it is not able to, with the reason why it has to */
  private async byRegisters(work: () => Promise<void>): Promise<void> {
    try {
      await work();
    } catch (cause) {
      if (!(cause instanceof VhostdError && cause.code === "notSupported")) throw cause;
      throw withMore(cause, `: ${this.obstacle ?? "its PF could not move it"}`);
    }
  }

  /**
   * Whether the device stands, stopped, exactly where `wanted` begins.
   * @throws VhostdError io where it has moved from where it was stopped
   */
  private async continues(wanted: DeviceState, deadline: Deadline): Promise<boolean> {
    const { current } = this;
    if (current.kind !== "frozen") return false;
    if ((await this.vf.admin.status(this.vf.vdevId, deadline)) === "init") return false;
    const { state } = await this.save(current.state, deadline);
    const { deviceClass } = this.host;
    // The configuration space is the device's own matter, and so is what it takes of a receive queue.
    const before = withoutReceived(current.state, deviceClass);
    const moved = compare({ ...withoutReceived(state, deviceClass), config: before.config }, before);
    const compared = (one: DeviceState) => {
      return { ...one, config: comparedBytes(deviceClass, wanted.features, one.config) };
    };
    if (moved.length === 0) return compare(compared(state), compared(wanted)).length === 0;
    throw new VhostdError("io", `${this.name} went on while it was stopped: ${moved.join("; ")}`, {
      fix: "restart the guest's driver (reboot the guest)",
    });
  }

  /** Writes the whole state, wherever the device is. */
  private async program(wanted: DeviceState, deadline: Deadline): Promise<void> {
    const { admin, vdevId } = this.vf;
    const [generation] = await Promise.all([
      deadline.race(this.device.configGeneration()),
      this.bringTo("freezed", deadline),
    ]);
    await admin.restore(vdevId, toVendorState(wanted, this.host, generation), deadline);
  }

  /** Freezes the device and reads its state. */
  private async save(configured: DeviceState, deadline: Deadline): Promise<SavedState> {
    const { admin, vdevId } = this.vf;
    await this.bringTo("freezed", deadline);
    return this.read(await admin.save(vdevId, deadline), configured);
  }

  private read(saved: VendorState, configured: DeviceState): SavedState {
    return readSaved(saved, configured, this.name, this.host.control()?.index);
  }

  private async bringTo(to: SettableStatus, deadline: Deadline): Promise<void> {
    await this.step(await this.vf.admin.status(this.vf.vdevId, deadline), to, deadline);
  }

  private async step(from: InternalStatusName, to: SettableStatus, deadline: Deadline): Promise<void> {
    for (const step of stepsTo(from, to)) await this.vf.admin.modify(this.vf.vdevId, step, deadline);
  }

  /**
   * The first freeze of a stop. A device may refuse it until it has drained.
   * @throws VhostdError with what has not drained, where that is why
   */
  private async stopFor(configured: DeviceState, memory: RingMemory, modeOf: ModeOf, deadline: Deadline) {
    const { admin, vdevId } = this.vf;
    const kept = Math.min(REASON_TIME.most, deadline.remaining * REASON_TIME.share);
    try {
      await this.bringTo("freezed", deadline.before(kept));
    } catch (cause) {
      if (!isImpatience(cause)) throw cause;
      const reason = await admin
        .save(vdevId, deadline)
        .then((saved) => rewound(this.read(saved, configured), memory, this.host.deviceClass))
        .then((saved) => undrained(saved, memory, modeOf))
        .catch(() => undefined);
      throw reason === undefined ? cause : withMore(cause, `: ${reason}`);
    }
  }

  /** @throws what the step that failed does; the status is what it was then, or the error says it */
  private async changeByHand(to: SettableStatus, deadline: Deadline): Promise<void> {
    const { admin, vdevId } = this.vf;
    const from = await admin.status(vdevId, deadline);
    try {
      await this.step(from, to, deadline);
    } catch (cause) {
      if (!(cause instanceof VhostdError)) throw cause;
      const back = Deadline.after(CLEAN_UP_TIMEOUT, `the way back of ${this.name}`);
      if (from !== "init") await this.bringTo(from, back).catch(() => {});
      const now = await admin.status(vdevId, back).catch(() => undefined);
      if (now === from) throw cause;
      const where = now === undefined ? "its status is not known" : `it was ${from} and is ${now}`;
      throw withMore(cause, `; ${where}`);
    }
  }

  /** false also where nobody can say. */
  private async isFreezed(deadline: Deadline): Promise<boolean> {
    const { admin, vdevId } = this.vf;
    const asked = Deadline.after(Math.min(ASK_TIMEOUT, deadline.remaining / 2), `the status of ${this.name}`);
    return admin.status(vdevId, asked).then(
      (status) => status === "freezed",
      () => false,
    );
  }

  private get obstacle(): string | undefined {
    return this.vf.admin.obstacle(this.vf.vdevId);
  }

  private get device(): VirtioPciDevice {
    return this.host.device;
  }

  private notRunning(): VhostdError {
    return new VhostdError("invalid", `${this.name} is not running`);
  }

  private get name(): string {
    return this.device.fn.address;
  }
}

/** @throws VhostdError invalid */
function stateOf(snapshot: MoverSnapshot): State {
  return snapshot.kind === "reset" ? snapshot : { ...snapshot, state: decodeDeviceState(snapshot.state) };
}

/** A step that the device did not take in time, as one does not that is still busy. */
function isImpatience(error: unknown): error is VhostdError {
  if (error instanceof AdminRefusal) return !error.final;
  return error instanceof VhostdError && (error.code === "quiesceFailed" || error.code === "freezeFailed");
}

/** The same error, which says more. */
function withMore(cause: VhostdError, more: string): VhostdError {
  const { fix, data } = cause;
  return new VhostdError(cause.code === "system" ? cause.number : cause.code, `${cause.message}${more}`, {
    cause,
    ...(fix === undefined ? {} : { fix }),
    ...(data === undefined ? {} : { data }),
  });
}
