import { Deadline } from "../../base/deadline.ts";
import { asError, VhostdError } from "../../base/errors.ts";
import { readCommonRegister } from "../admin/common-register.ts";
import { type SettableStatus, stepsTo } from "../admin/vendor.ts";
import type { VendorAdmin } from "../admin/vendor-admin.ts";
import { checkBases, readSaved, type SavedState, toVendorState, undrained } from "../admin/vendor-state.ts";
import type { DeviceState } from "../device-state.ts";
import { compare, decodeDeviceState, encodeDeviceState } from "../device-state-codec.ts";
import type { FreezeMode, ManualControl, MoverCapabilities, MoverHost, MoverSnapshot, StateMover } from "../mover.ts";
import { describeStatus, type VirtioPciDevice } from "../pci-device.ts";
import type { RingMemory } from "../split-ring.ts";
import { RegistersMover } from "./registers.ts";

/** Milliseconds between two looks at a device that drains: the first, and the longest. */
const DRAIN_INTERVAL = { first: 1, longest: 20 } as const;
/** Milliseconds to bring the device to rest where the caller's deadline may have passed. */
const CLEAN_UP_TIMEOUT = 5000;
/** Milliseconds that a quick reset spends at most to learn that it may be quick. */
const ASK_TIMEOUT = 1000;

/** Which VF of a managed PF a mover moves. */
export interface ManagedVf {
  readonly admin: VendorAdmin;
  readonly vdevId: number;
}

/** `frozen`: freezed, with the state that it had then. */
type State =
  | { readonly kind: "reset" }
  | { readonly kind: "running"; readonly state: DeviceState }
  | { readonly kind: "frozen"; readonly state: DeviceState };

/**
 * Moves the state of a VF through the vendor's admin commands. Ring indices are part of that state, so the VF resumes
 * anywhere. An operator may change its internal status at any time: it is always asked. When the admin queue dies the
 * VF is moved by its registers from then on, which can only drain it and begin at index 0.
 */
export class VendorMover implements StateMover {
  readonly kind = "vendor";
  readonly manual: ManualControl;
  private current: State;
  /** The end, good or bad, of a reset that was not waited for. */
  private cleanUp: Promise<unknown> | undefined;
  private registers: RegistersMover | undefined;

  /** @throws VhostdError invalid where the snapshot of an earlier process is malformed */
  constructor(
    private readonly host: MoverHost,
    private readonly vf: ManagedVf,
    snapshot: MoverSnapshot = { kind: "reset" },
  ) {
    this.current = snapshot.kind === "reset" ? snapshot : { ...snapshot, state: decodeDeviceState(snapshot.state) };
    this.manual = {
      status: (deadline) => vf.admin.status(vf.vdevId, deadline),
      change: (to, deadline) => this.bringTo(to, deadline),
    };
  }

  get capabilities(): MoverCapabilities {
    return { resumeAnywhere: this.vf.admin.dead === undefined, dirtyTracking: false };
  }

  async configure(wanted: DeviceState, deadline: Deadline): Promise<void> {
    await this.settle(deadline);
    const registers = this.fallback();
    if (registers !== undefined) return registers.configure(wanted, deadline);
    try {
      checkBases(wanted, this.name);
      if (!(await this.continues(wanted, deadline))) await this.program(wanted, deadline);
      await this.bringTo("running", deadline);
      const status = await deadline.race(this.device.status());
      if (status !== wanted.status) {
        throw new VhostdError("io", `${this.name} does not run with what was restored: ${describeStatus(status)}`);
      }
    } catch (error) {
      this.current = { kind: "reset" };
      await this.device.reset(Deadline.after(CLEAN_UP_TIMEOUT, `reset of ${this.name}, which did not start`));
      throw error;
    }
    this.current = { kind: "running", state: wanted };
  }

  async freeze(memory: RingMemory, mode: FreezeMode, deadline: Deadline): Promise<DeviceState> {
    const { current } = this;
    if (this.registers === undefined && current.kind === "frozen") return current.state;
    const registers = this.fallback();
    if (registers !== undefined) return registers.freeze(memory, mode, deadline);
    if (current.kind === "reset") throw new VhostdError("invalid", `${this.name} is not running`);
    let reason: string | undefined;
    try {
      for (let interval: number = DRAIN_INTERVAL.first; ; interval = Math.min(2 * interval, DRAIN_INTERVAL.longest)) {
        const saved = await this.save(current.state, deadline);
        reason = undrained(saved, memory, mode);
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
    await this.settle(deadline);
    const registers = this.fallback();
    if (registers !== undefined) return registers.reset(deadline);
    if (this.current.kind === "frozen" && (await this.isFreezed(deadline))) {
      const reset = this.device.reset(Deadline.after(CLEAN_UP_TIMEOUT, `reset of ${this.name}, which was freezed`));
      this.cleanUp = reset.then(() => undefined, asError);
    } else {
      await this.device.reset(deadline);
    }
    this.current = { kind: "reset" };
  }

  snapshot(): MoverSnapshot {
    if (this.registers !== undefined) return this.registers.snapshot();
    const { current } = this;
    return current.kind === "reset" ? current : { kind: current.kind, state: encodeDeviceState(current.state) };
  }

  /** What an earlier reset left behind is done. @throws VhostdError resetTimedOut where it cannot be */
  private async settle(deadline: Deadline): Promise<void> {
    if (this.cleanUp !== undefined) await deadline.race(this.cleanUp);
    this.cleanUp = undefined;
    // Where the registers have taken over, their mover alone knows what the device stands at.
    if (this.registers !== undefined || this.current.kind !== "reset") return;
    // It failed, or was the task of an earlier process.
    const unfinished = (await deadline.race(this.device.status())) !== 0;
    if (unfinished) await this.device.reset(deadline);
  }

  /** Who moves the VF once the admin queue is dead. A device that is freezed can only be reset by its registers. */
  private fallback(): RegistersMover | undefined {
    if (this.registers === undefined && this.vf.admin.dead !== undefined) {
      const snapshot = this.snapshot();
      this.registers = new RegistersMover(this.host, snapshot.kind === "frozen" ? { kind: "reset" } : snapshot);
    }
    return this.registers;
  }

  /**
   * Whether the device stands, stopped, exactly where `wanted` begins.
   * @throws VhostdError io where it should, and has moved
   */
  private async continues(wanted: DeviceState, deadline: Deadline): Promise<boolean> {
    const { current } = this;
    if (current.kind !== "frozen" || compare(current.state, wanted).length > 0) return false;
    if ((await this.vf.admin.status(this.vf.vdevId, deadline)) === "init") return false;
    const { state } = await this.save(wanted, deadline);
    const differences = compare(state, wanted);
    if (differences.length === 0) return true;
    throw new VhostdError("io", `${this.name} went on while it was stopped: ${differences.join("; ")}`, {
      fix: "restart the guest's driver (reboot the guest)",
    });
  }

  /** Writes the whole state, wherever the device is. */
  private async program(wanted: DeviceState, deadline: Deadline): Promise<void> {
    const { admin, vdevId } = this.vf;
    await this.bringTo("freezed", deadline);
    const generation = await deadline.race(readCommonRegister(this.device, "configGeneration"));
    await admin.restore(vdevId, toVendorState(wanted, this.host, generation), deadline);
  }

  /** Freezes the device and reads its state. */
  private async save(configured: DeviceState, deadline: Deadline): Promise<SavedState> {
    const { admin, vdevId } = this.vf;
    await this.bringTo("freezed", deadline);
    return readSaved(await admin.save(vdevId, deadline), configured, this.name);
  }

  private async bringTo(to: SettableStatus, deadline: Deadline): Promise<void> {
    const { admin, vdevId } = this.vf;
    const from = await admin.status(vdevId, deadline);
    for (const step of stepsTo(from, to)) await admin.modify(vdevId, step, deadline);
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

  private get device(): VirtioPciDevice {
    return this.host.device;
  }

  private get name(): string {
    return this.device.fn.address;
  }
}
