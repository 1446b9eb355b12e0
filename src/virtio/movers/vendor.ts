import { both } from "../../base/both.ts";
import { Deadline } from "../../base/deadline.ts";
import { asError, VhostdError } from "../../base/errors.ts";
import type { InternalStatusName, SettableStatus } from "../admin/vendor.ts";
import type { VendorAdmin } from "../admin/vendor-admin.ts";
import { checkBases, ended, readSaved, type SavedState, withQueuesOf } from "../admin/vendor-state.ts";
import { type DeviceState, withEnabled } from "../device-state.ts";
import { compare } from "../device-state-codec.ts";
import type { Tracking } from "../dirty-log.ts";
import { Status } from "../features.ts";
import type {
  FreezeMode,
  ManualControl,
  MoverCapabilities,
  MoverHost,
  MoverSnapshot,
  StartSteps,
  StateMover,
  TakenUp,
  TakeUp,
} from "../mover.ts";
import { describeStatus, type VirtioPciDevice } from "../pci-device.ts";
import type { RingMemory } from "../split-ring.ts";
import { RegistersMover } from "./registers.ts";
import { drain } from "./vendor-drain.ts";
import { goOn } from "./vendor-go-on.ts";
import { LateLook } from "./vendor-late.ts";
import { checkStood, isSame, type Position, positionOf, snapshotOf } from "./vendor-position.ts";
import { program } from "./vendor-program.ts";
import { CLEAN_UP_TIMEOUT, InternalSteps, withMore, withReason } from "./vendor-steps.ts";
import { type TrackingMeans, VendorTracking } from "./vendor-tracking.ts";

/** Which VF of a managed PF a mover moves. */
export interface ManagedVf {
  readonly admin: VendorAdmin;
  readonly vdevId: number;
  /** Left out where its PF cannot say which pages it writes. */
  readonly tracking?: TrackingMeans;
}

/** Milliseconds between two looks at whether a late command is answered. */
const ARREARS_INTERVAL = 5;

type ModeOf = (queue: number) => FreezeMode;

/**
 * Moves the state of a VF through the vendor's admin commands. Ring indices are part of that state, so the VF resumes
 * anywhere. An operator may change its internal status at any time: it is always asked. While the admin queue is dead,
 * or has not answered a command that may still alter the VF, the VF is moved by its registers, which can only drain it
 * and begin at index 0.
 */
export class VendorMover implements StateMover {
  readonly kind = "vendor";
  readonly manual: ManualControl;
  private readonly steps: InternalSteps;
  private readonly tracking: VendorTracking;
  private current: Position;
  /** The end of a reset that was not waited for: what went wrong, or undefined. */
  private cleanUp: Promise<Error | undefined> | undefined;
  /** How far it has come when it was to stand by is not known; of an earlier mover neither. */
  private unsure = true;
  /** Status 0 was read after the last reset; not known of one that failed or was the task of an earlier process. */
  private atRest = false;
  private registers: RegistersMover | undefined;
  /** What it runs with while its queues are being changed: it stands and goes on then, which no record says. */
  private enabling: DeviceState | undefined;
  /** An earlier process died, maybe in the middle of a change of which its record says nothing. */
  private inherited = false;
  private readonly late: LateLook;

  /** @throws VhostdError invalid where the snapshot of an earlier process is malformed */
  constructor(
    private readonly host: MoverHost,
    private readonly vf: ManagedVf,
    snapshot: MoverSnapshot = { kind: "reset" },
  ) {
    this.current = positionOf(snapshot);
    this.steps = new InternalSteps(vf.admin, vf.vdevId, this.name);
    this.manual = {
      status: (deadline) => this.steps.status(deadline),
      change: (to, deadline) => this.change(to, deadline),
    };
    this.tracking = new VendorTracking(vf, this.name, snapshot.tracking);
    this.late = new LateLook({
      ...{ host, vf, steps: this.steps },
      position: () => this.position(),
      isBlocked: () => this.fallback() !== undefined,
      goOn: (found, running, deadline) => this.goOn(found, running, deadline),
    });
  }

  get capabilities(): MoverCapabilities {
    const able = this.obstacle === undefined;
    return { resumeAnywhere: able, dirtyTracking: able && this.tracking.proven };
  }

  prove(deadline: Deadline): Promise<void> {
    return this.tracking.prove(deadline);
  }

  async track(wanted: Tracking | undefined, deadline: Deadline): Promise<string | undefined> {
    try {
      return await this.tracking.track(wanted, deadline);
    } catch (error) {
      // What it cannot be told to leave alone it does not touch while it stands still.
      if (this.snapshot().kind === "reset" && (this.atRest || this.cleanUp !== undefined)) await this.tracking.quiet();
      throw error;
    }
  }

  onTrackingLost(handler: (error: Error) => void): void {
    this.tracking.onLost(handler);
  }

  abandon(): void {
    this.late.abort();
    this.tracking.abandon();
  }

  configure(wanted: DeviceState, deadline: Deadline, steps?: StartSteps): Promise<void> {
    return this.bringUp(wanted, "running", deadline, steps);
  }

  async takeUp(deadline: Deadline, how: TakeUp): Promise<TakenUp> {
    const { current } = this;
    this.inherited = true;
    // What stands still is looked at by the next start.
    if (current.kind !== "starting" && current.kind !== "running") return "asRecorded";
    const registers = this.fallback();
    if (registers !== undefined) {
      const taken = await registers.takeUp(deadline, how);
      await this.askLater(how);
      return taken;
    }
    const asked = deadline.race(this.device.status()).catch(() => undefined);
    const [found, status] = await Promise.all([this.steps.ask(deadline), asked]);
    const isUp = status !== undefined && (status & Status.driverOk) !== 0;
    const standsStill = found === "quiesced" || found === "freezed";
    if (current.kind === "starting") {
      // It has the state before it may use it.
      if (isUp && !standsStill) this.current = { kind: "running", state: current.state };
      else await this.comeToRest();
    } else if (status !== undefined && !isUp) {
      await this.comeToRest();
      return "reset";
    } else if (standsStill && !how.held) {
      try {
        await this.goOn(found, current.state, deadline, how.connect);
      } catch (error) {
        this.host.log(`an earlier process left it standing still, and it does not go on: ${asError(error).message}`);
        await this.comeToRest();
        return "reset";
      }
    }
    if (found === undefined) await this.askLater(how);
    return "asRecorded";
  }

  private goOn(found: InternalStatusName, running: DeviceState, deadline: Deadline, connect = nothing): Promise<void> {
    const { host, vf, steps } = this;
    return goOn(steps, { host, vf, found, running, letGo: () => this.letGo("running", deadline, connect) }, deadline);
  }

  /** It could not be asked whether it stands still. */
  private async askLater({ held, connect }: TakeUp): Promise<void> {
    if (held || this.position().kind !== "running") return;
    // Eventfds are borrowed for now only.
    await connect?.();
    this.late.begin();
  }

  /** One that refuses is asked again by the start. */
  async standBy(deadline: Deadline): Promise<void> {
    const registers = await this.settle(deadline);
    if (registers !== undefined || this.current.kind !== "reset") return;
    this.unsure = true;
    await this.steps.standBy(deadline);
    this.unsure = false;
    this.current = { kind: "standby" };
  }

  /** A command that was to let it stand by, and is done late, would stop a device that its registers had started. */
  private async becomeSure(deadline: Deadline): Promise<void> {
    if (!this.unsure) return;
    this.unsure = false;
    const patience = Deadline.after(deadline.remaining / 2, `${this.name} standing by`);
    await patience.poll(() => this.steps.settled || undefined, ARREARS_INTERVAL).catch(() => {});
  }

  /** A device that is moved by its registers does not stand still with a state: there is nothing to prepare. */
  async prepare(wanted: DeviceState, deadline: Deadline): Promise<void> {
    await this.becomeSure(deadline);
    const registers = await this.settle(deadline);
    if (registers !== undefined) return;
    if (this.current.kind === "running") throw new VhostdError("invalid", `${this.name} is running`);
    this.atRest = false;
    await this.orReset(async () => {
      checkBases(wanted, this.name);
      await this.program(wanted, this.mayBeFreezed, deadline);
    });
    this.current = { kind: "prepared", state: wanted };
  }

  /** @param to where the device is left; what it is given it has taken then */
  private async bringUp(
    wanted: DeviceState,
    to: SettableStatus,
    deadline: Deadline,
    steps: StartSteps = {},
  ): Promise<void> {
    await this.becomeSure(deadline);
    const registers = await this.settle(deadline);
    this.atRest = false;
    if (registers !== undefined) {
      await this.byRegisters(() => registers.configure(wanted, deadline, steps));
      return await this.tracking.confirm(deadline);
    }
    const { connect = nothing, note = nothing } = steps;
    await this.orReset(async () => {
      checkBases(wanted, this.name);
      const { current, mayBeFreezed } = this;
      const isPrepared = current.kind === "prepared" && isSame(current.state, wanted, this.host.deviceClass);
      const goesOn = isPrepared || (await this.continues(wanted, deadline));
      this.current = { kind: "starting", state: wanted };
      const noted = note();
      noted.catch(nothing);
      // By the record it would still stand where it was stopped.
      if (current.kind === "frozen" && !goesOn) await deadline.race(noted);
      if (!goesOn) await this.program(wanted, mayBeFreezed, deadline);
      const connected = () => Promise.all([connect(), noted]);
      let status = await this.letGo(to, deadline, connected);
      if (isPrepared && status === 0) {
        // It was reset meanwhile.
        await this.program(wanted, true, deadline);
        status = await this.letGo(to, deadline, connected);
      }
      if (status === wanted.status) return;
      throw new VhostdError("io", `${this.name} does not run with what was restored: ${describeStatus(status)}`);
    });
    this.inherited = false;
    this.current = { kind: "running", state: wanted };
  }

  /** @throws what the work does; the device is reset then */
  private async orReset(work: () => Promise<void>): Promise<void> {
    try {
      await work();
    } catch (error) {
      // Until it is at rest it may be running.
      if (this.current.kind !== "starting") this.current = { kind: "reset" };
      await this.comeToRest();
      throw error;
    }
  }

  private async comeToRest(): Promise<void> {
    const deadline = Deadline.after(CLEAN_UP_TIMEOUT, `reset of ${this.name}, which did not start`);
    await this.device.reset(deadline);
    this.atRest = true;
    this.inherited = false;
    this.current = { kind: "reset" };
    await this.tracking.wasReset(deadline);
  }

  async freeze(memory: RingMemory, mode: FreezeMode, deadline: Deadline): Promise<DeviceState> {
    using _still = await this.late.hold(deadline);
    // A look in between would keep it waiting.
    using _alone = this.tracking.hold();
    const isFrozen = this.registers === undefined && this.current.kind === "frozen";
    const registers = isFrozen ? undefined : this.fallback();
    if (registers !== undefined) return await this.freezeBy(registers, memory, mode, deadline);
    const { current } = this;
    if (current.kind === "running") {
      try {
        return await this.stop(current.state, memory, () => mode, deadline);
      } catch (error) {
        // A command that may still alter it was never answered: its registers are left, and some time.
        const left = deadline.expired ? undefined : this.fallback();
        if (left === undefined) throw error;
        this.host.log(`it is stopped by its registers, because its PF does not do it: ${asError(error).message}`);
        return await this.freezeBy(left, memory, mode, deadline).catch((second) => {
          throw error instanceof VhostdError ? withMore(error, `: ${asError(second).message}`) : error;
        });
      }
    }
    if (current.kind !== "frozen") throw this.notRunning();
    await this.tracking.finish(deadline);
    return current.state;
  }

  private async freezeBy(registers: RegistersMover, memory: RingMemory, mode: FreezeMode, deadline: Deadline) {
    const state = await registers.freeze(memory, mode, deadline);
    await this.tracking.finish(deadline);
    return state;
  }

  async enable(queues: ReadonlySet<number>, memory: RingMemory, deadline: Deadline): Promise<void> {
    using _still = await this.late.hold(deadline);
    const registers = this.fallback();
    if (registers !== undefined) return await this.byRegisters(() => registers.enable(queues, memory, deadline));
    const { current } = this;
    if (current.kind !== "running") throw this.notRunning();
    if (compare(current.state, withEnabled(current.state, queues)).length === 0) return;
    const found = await this.steps.status(deadline);
    // What an operator holds stays held.
    const to = found === "init" || this.late.mayStand ? "running" : found;
    this.enabling = current.state;
    try {
      await this.restart(current.state, queues, to, memory, deadline);
    } finally {
      this.enabling = undefined;
    }
    this.late.end();
  }

  /** With these of its queues. */
  private async restart(
    running: DeviceState,
    queues: ReadonlySet<number>,
    to: SettableStatus,
    memory: RingMemory,
    deadline: Deadline,
  ): Promise<void> {
    let state: DeviceState;
    try {
      // What a queue has taken that is not to be used any more would not come back.
      state = await this.stop(running, memory, (index) => (queues.has(index) ? "listed" : "drained"), deadline);
    } catch (error) {
      const back = Deadline.after(CLEAN_UP_TIMEOUT, `the way back of ${this.name}`);
      await this.steps.bringTo(to, back).catch(() => {});
      throw error;
    }
    await this.bringUp(withEnabled(state, queues), to, deadline);
  }

  /** Freezes the running device, with all given back that its queues must not keep, and all marked that it has written. */
  private async stop(
    running: DeviceState,
    memory: RingMemory,
    modeOf: ModeOf,
    deadline: Deadline,
  ): Promise<DeviceState> {
    // It stands still whenever that is the last time.
    const save = async (deadline: Deadline) => {
      const [saved] = await both(this.save(running, deadline, memory), this.tracking.finish(deadline));
      return saved;
    };
    const state = await drain(this.steps, { host: this.host, memory, modeOf, save }, deadline);
    this.inherited = false;
    this.current = { kind: "frozen", state };
    return state;
  }

  /** By hand. Where it was prepared it is given its state anew. */
  private async change(to: SettableStatus, deadline: Deadline): Promise<void> {
    using _still = await this.late.hold(deadline);
    if (this.current.kind === "prepared") this.current = { kind: "standby" };
    await this.steps.change(to, deadline);
    this.late.end();
  }

  /** A device that is freezed uses no memory: the end of its reset is not waited for. */
  async reset(deadline: Deadline): Promise<void> {
    this.late.abort();
    using _still = await this.late.hold(deadline);
    const registers = await this.settle(deadline);
    if (registers !== undefined) {
      await registers.reset(deadline);
    } else if (this.mayBeFreezed && (await this.steps.isFreezed(deadline))) {
      const reset = this.device.reset(Deadline.after(CLEAN_UP_TIMEOUT, `reset of ${this.name}, which was freezed`));
      this.cleanUp = reset.then(() => undefined, asError);
      this.current = { kind: "reset" };
    } else {
      await this.device.reset(deadline);
      this.atRest = true;
      this.current = { kind: "reset" };
    }
    await this.tracking.wasReset(deadline);
  }

  /** One that stands by or was prepared is reset by the next process. */
  snapshot(): MoverSnapshot {
    const { enabling } = this;
    const position = enabling === undefined ? this.position() : snapshotOf({ kind: "running", state: enabling });
    return { ...position, ...this.tracking.snapshot() };
  }

  private position(): MoverSnapshot {
    if (this.registers !== undefined) return this.registers.snapshot();
    return snapshotOf(this.current);
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
    const isBlank = this.current.kind === "reset" || this.current.kind === "starting";
    if (registers !== undefined || !isBlank || this.atRest) return registers;
    const left = this.inherited && (await this.steps.ask(deadline)) !== "init";
    if (left || (await deadline.race(this.device.status())) !== 0) await this.device.reset(deadline);
    this.atRest = true;
    this.inherited = false;
    this.current = { kind: "reset" };
    return undefined;
  }

  /** Who moves the VF while the admin queue cannot. A device that is freezed can only be reset by its registers. */
  private fallback(): RegistersMover | undefined {
    const blocked = this.obstacle !== undefined;
    if (blocked && this.registers === undefined) {
      const snapshot = this.position();
      this.registers = new RegistersMover(this.host, snapshot.kind === "frozen" ? { kind: "reset" } : snapshot);
    } else if (!blocked && this.registers !== undefined) {
      this.current = positionOf(this.registers.snapshot());
      this.registers = undefined;
    }
    return this.registers;
  }

  /** @throws what the registers mover does; where it is not able to, with the reason why it has to */
  private byRegisters(work: () => Promise<void>): Promise<void> {
    return withReason(work, () => this.obstacle ?? "its PF could not move it");
  }

  /**
   * Whether the device stands, stopped, exactly where `wanted` begins.
   * @throws VhostdError io where it has moved from where it was stopped
   */
  private async continues(wanted: DeviceState, deadline: Deadline): Promise<boolean> {
    const { current } = this;
    if (current.kind !== "frozen") return false;
    const status = await this.steps.status(deadline);
    if (status === "init") return false;
    await this.steps.step(status, "freezed", deadline);
    const { state } = await this.save(current.state, deadline);
    checkStood(this.name, current.state, state, this.host.deviceClass);
    return isSame(state, wanted, this.host.deviceClass);
  }

  private program(wanted: DeviceState, mayBeFreezed: boolean, deadline: Deadline): Promise<void> {
    const { steps, host, vf } = this;
    return program(steps, { host, vf, wanted, mayBeFreezed }, deadline);
  }

  /**
   * From freezed, where it stands with what it is to begin with. What its PF needs time for is asked for first.
   * @returns its status afterwards
   */
  private async letGo(to: SettableStatus, deadline: Deadline, connect: () => Promise<unknown>): Promise<number> {
    await this.tracking.confirm(deadline);
    const left = this.steps.leaveFreezed(deadline);
    // A device that its registers stopped was kept from memory; where it is to go on it stands only now.
    await both(left, deadline.race(Promise.all([this.device.setBusMaster(true), connect()])));
    await this.steps.step("quiesced", to, deadline);
    return await deadline.race(this.device.status());
  }

  /**
   * What the device says of itself.
   * @param configured what it was told
   * @param memory the guest's, where an earlier process may have told it of other queues
   */
  private async save(configured: DeviceState, deadline: Deadline, memory?: RingMemory): Promise<SavedState> {
    const { admin, vdevId } = this.vf;
    const saved = await admin.save(vdevId, deadline);
    const own = this.host.control()?.index;
    const isOpen = this.inherited && memory !== undefined;
    const told = isOpen ? ended(withQueuesOf(saved, configured, own), configured, memory) : configured;
    return readSaved(saved, told, this.name, own);
  }

  /** The device stands still on its own account. */
  private get mayBeFreezed(): boolean {
    const { kind } = this.current;
    return kind === "standby" || kind === "prepared" || kind === "frozen";
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

async function nothing(): Promise<void> {}
