import { Deadline } from "../base/deadline.ts";
import { asError, sentence, VhostdError } from "../base/errors.ts";
import type { Logger } from "../base/log.ts";
import { OperationQueue } from "../base/operation-queue.ts";
import type { OwnedFd } from "../native/fd.ts";
import type { PciAddress } from "../pci/address.ts";
import type { BusEntry } from "../pci/bus.ts";
import type { QueueStats } from "../pci/function.ts";
import type { SessionEnd } from "../vhost-user/session.ts";
import type { InternalStatusName } from "../virtio/admin/vendor.ts";
import type { DeviceFailure } from "../virtio/device-watch.ts";
import { configColumns } from "./config-columns.ts";
import { FrontEnds } from "./front-ends.ts";
import { Link, type LinkBefore } from "./link.ts";
import { ManualStatus, type ManualTarget } from "./manual-status.ts";
import { NO_MEMORY, NO_RINGS, OpenRings } from "./open-rings.ts";
import { Patience } from "./patience.ts";
import { queueStatsOf } from "./queue-statistics.ts";
import { closing, parseVfOptions, takeFds, type VfRecord } from "./record.ts";
import type { VfBefore } from "./renewal.ts";
import { VfClosing } from "./vf-closing.ts";
import { VfMemory } from "./vf-memory.ts";
import {
  type LeftFunction,
  managementOf,
  openParts,
  reviveParts,
  type VfManagement,
  type VfMover,
  type VfOptions,
  type VfParts,
  type VfSurroundings,
  vfKey,
} from "./vf-parts.ts";
import { storingOf, takeSnapshot, type VfParticulars, type VfSnapshot } from "./vf-snapshot.ts";
import { checkTransition, type VfState } from "./vf-state.ts";
import { VfTarget } from "./vf-target.ts";

/** One virtual function in the daemon's hands: its life cycle. */
export class Vf {
  private current: VfState;
  /** Why the device asks for a reset, or why the last front-end was turned away; undefined where all is well. */
  private trouble: string | undefined;
  /** Why its function is not open again yet. */
  private hindrance: string | undefined;
  private readonly operations = new OperationQueue();
  private readonly log: Logger;
  private readonly frontEnds: FrontEnds;
  private readonly patience: Patience;
  private readonly manual: ManualStatus;
  private readonly memory: VfMemory;
  private readonly link: Link;
  private readonly end: VfClosing;
  /** The internal status that an operator holds it in. */
  private held: VfRecord["held"];
  /** It is being reset for its front-end, or what that has left is being undone. */
  private underWay: VfParticulars["underWay"];
  /** After `remove`: settles when the function is closed, where that goes on still. */
  closing: Promise<void> | undefined;
  /** What a session may do with it. */
  readonly target: VfTarget;

  private constructor(
    readonly options: VfOptions,
    /** For those who only look. */
    readonly parts: VfParts,
    private readonly around: VfSurroundings,
    state: VfState,
    /** What its device still has to give back; outlives the VF where it never will. */
    readonly rings: OpenRings,
    link: LinkBefore,
  ) {
    this.current = state;
    this.log = around.log.child(`vf ${options.address}`);
    this.patience = new Patience(around.deadlines.lastDrain);
    this.manual = this.makeManual();
    this.memory = new VfMemory(options.address, parts.domain);
    this.target = this.makeTarget();
    this.link = this.makeLink(link);
    this.end = new VfClosing(options, parts, around, this.log, rings, () => this.target.hasShared);
    this.frontEnds = new FrontEnds({
      place: options,
      around,
      log: this.log,
      target: this.target,
      welcomes: (pid) => this.link.welcomes(pid),
      onEnd: (end) => this.onSessionEnd(end),
      onFailure: (error) => this.onSessionFailure(error),
    });
    parts.dataPath.onConfigChange(() => {
      this.target.configChanged();
      void this.link.look();
    });
    parts.dataPath.onFailure((reason) => this.onFailure(reason));
  }

  /**
   * Opens the function, resets it and begins to look for the front-end.
   * @param before what is known of it where it was here before
   * @throws VhostdError; nothing is left behind then
   */
  static async attach(
    options: VfOptions,
    entry: BusEntry,
    mover: VfMover,
    around: VfSurroundings,
    before: VfBefore = {},
  ): Promise<Vf> {
    const deadline = Deadline.after(around.deadlines.attach, `attaching ${options.address}`);
    await using undo = new AsyncDisposableStack();
    const parts = await openParts(options, entry, mover, around, undo, deadline);
    const rings = before.rings ?? OpenRings.revive(before.storedRings ?? NO_RINGS, parts.deviceClass);
    const link = before.link === undefined ? parts : { record: before.link };
    const vf = new Vf(options, parts, around, { name: "attaching" }, rings, link);
    vf.trouble = before.trouble;
    if (before.migration !== undefined) vf.target.migration.follows(before.migration);
    undo.defer(() => around.keeper.delete(vf.key));
    undo.defer(() => vf.become({ name: "absent" }));
    undo.defer(() => vf.lookNoMore());
    await vf.checkpoint();
    // It may have got lost meanwhile.
    vf.checkUsable();
    vf.frontEnds.start();
    // Where it listens that is known only now.
    if (vf.frontEnds.fds.size > 0) await vf.checkpoint();
    vf.become({ name: "idle" });
    if (before.link !== undefined) void vf.link.look();
    undo.move();
    return vf;
  }

  /**
   * Goes on with a VF from its record and fds, without a word to the function or the front-end. The domain must have
   * been revived before.
   * @throws VhostdError where the record or an fd does not fit; all fds are closed then
   */
  static async revive(
    left: LeftFunction,
    record: VfRecord,
    fds: Map<string, OwnedFd>,
    mover: VfMover,
    around: VfSurroundings,
  ): Promise<Vf> {
    using _unused = closing(fds);
    const options = parseVfOptions(record.options);
    await using undo = new AsyncDisposableStack();
    const parts = await reviveParts(options, left, record, fds, mover, around, undo);
    const rings = OpenRings.revive(record.rings, parts.deviceClass);
    const vf = new Vf(options, parts, around, { name: "adopting" }, rings, { record: record.link });
    vf.isHeldIn(record.held);
    vf.underWay = record.ending === true ? "end" : record.resetting === true ? "reset" : undefined;
    if (record.shared === true) vf.target.wasShared();
    const { session } = record;
    if (session === null) {
      await vf.takeUp();
      if (record.ending === true) await vf.finishEnd();
      vf.frontEnds.start(takeFds(fds, "frontEnds"));
    } else {
      await vf.frontEnds.revive(session, takeFds(fds, "session"), takeFds(fds, "frontEnds"), () => vf.takeUp());
      vf.target.migration.joined(vf.frontEnds.session?.peer);
    }
    // Nobody was there to be told of a change.
    void vf.link.look();
    undo.move();
    return vf;
  }

  /** Before its front-end is heard: the function is where the record says, or the session ends with the reason. */
  private async takeUp(): Promise<void> {
    const { dataPath } = this.parts;
    const deadline = Deadline.after(this.around.deadlines.start, `taking up ${this.address}`);
    const eventfds = this.frontEnds.session?.eventfds ?? new Map();
    try {
      const held = this.held !== undefined;
      const found = await this.operations.run(() => dataPath.takeUp(eventfds, deadline, { held }));
      if (found === "reset" && this.underWay === undefined)
        throw new VhostdError("io", "somebody has reset the function while nobody served it");
    } finally {
      if (this.current.name === "adopting") this.become({ name: dataPath.running ? "running" : "idle" });
    }
  }

  /** What an earlier process was about to undo when it died. */
  private async finishEnd(): Promise<void> {
    await this.target.release(NO_MEMORY);
    await this.memory.clear();
    this.underWay = undefined;
    await this.checkpoint();
  }

  private isHeldIn(status: VfRecord["held"]): void {
    this.held = status;
    this.trouble = status && `${status} by hand, its guest waits (let it go on with "vf -d -o 1")`;
  }

  get address(): PciAddress {
    return this.options.address;
  }

  get state(): VfState {
    return this.current;
  }

  /** A front-end is connected, or what it left is being undone. */
  get connected(): boolean {
    return this.frontEnds.session !== undefined;
  }

  /** What is wrong with the function or was with its last front-end, or null. */
  get reason(): string | null {
    if (this.hindrance !== undefined) return this.hindrance;
    if (this.current.name === "failed") return this.current.reason;
    const refused = this.frontEnds.session?.refusedMemory;
    const trouble = this.trouble ?? (refused === undefined ? this.link.trouble : sentence(refused));
    if (trouble !== undefined) return trouble;
    // A guest that runs may do without the queues that were lost.
    return (this.current.name === "running" ? undefined : this.rings.trouble) ?? null;
  }

  /** As its bus described it when it was added. */
  get entry(): BusEntry {
    return this.parts.entry;
  }

  /** Driver features of the front-end that runs now, or null. */
  get driverFeatures(): bigint | null {
    return this.current.name === "running" ? (this.frontEnds.session?.status.features ?? null) : null;
  }

  /** What the class shows of the configuration space. */
  get columns(): Readonly<Record<string, string>> {
    const { deviceClass, deviceFeatures } = this.target;
    return configColumns(deviceClass, this.parts.config, deviceFeatures, this.log);
  }

  /** How its state is moved, and why not better. */
  get management(): VfManagement {
    return managementOf(this.parts);
  }

  /** Changes the internal status by hand, where `to` is given. @returns the status afterwards */
  move(to: ManualTarget | undefined): Promise<InternalStatusName> {
    return this.manual.move(to);
  }

  /** See queueStatsOf. */
  async queueStats(): Promise<readonly QueueStats[] | null> {
    if (this.current.name === "failed" || this.end.hasBegun) return null;
    return await queueStatsOf(this.parts.fn, this.target, this.around.deadlines.stats, this.log);
  }

  /** What a VF that takes its place has to know. */
  get before(): VfBefore {
    const { migration } = this.target;
    return { rings: this.rings, link: this.link.snapshot(), trouble: this.trouble, migration };
  }

  /** After its last session: closes the function, which a VF that takes its place opens again. */
  async retire(): Promise<void> {
    this.lookNoMore();
    if (this.current.name === "idle") this.become({ name: "attaching" });
    await this.frontEnds.close("the function is opened again");
    // Who removes it meanwhile does not wait behind a kernel that takes its time.
    const closed = await this.operations.run(async () => [this.end.letGo()]);
    await Promise.all(closed);
  }

  /** The VF that is to take its place cannot open the function yet. */
  hindered(reason: string): void {
    if (reason === this.hindrance) return;
    this.hindrance = reason;
    this.around.onState(this);
  }

  /** Its VM is being migrated, and the VMM has not read all of what the function has written. */
  get isMigrating(): boolean {
    return this.frontEnds.session?.owesPages === true;
  }

  /** Where it is: the function stops, all pages are marked, and when the VMM has read that the session ends. Never rejects. */
  async leaveMigration(deadline: Deadline): Promise<void> {
    if (!this.isMigrating) return;
    // What the device has in flight is not waited for longer than the VMM.
    this.patience.hurry();
    this.target.loseTracking(new VhostdError("cancelled", "this daemon ends"));
    const missed = "its VMM did not read in time what the function has written";
    await deadline.race(this.frontEnds.last()).catch((error) => this.log.warn(missed, asError(error)));
  }

  /**
   * Ends the session, resets and closes the function. Whatever happens, the VF is gone afterwards, but for a kernel that
   * takes its time: see `closing`.
   * @returns a warning, where the function was given away and somebody can go on using it
   */
  async remove(): Promise<string | undefined> {
    this.patience.hurry();
    this.link[Symbol.dispose]();
    this.memory.giveUp();
    await this.frontEnds.close("the VF is being removed");
    await this.operations.run(async () => {
      const hasFailed = this.current.name === "failed";
      this.become({ name: "detaching" });
      try {
        if (!hasFailed && !this.end.hasBegun) await this.end.lastReset();
        await Deadline.after(this.around.deadlines.close, `closing ${this.address}`).race(this.end.letGo());
      } catch (error) {
        if (!(error instanceof VhostdError && error.code === "timedOut")) throw error;
        this.log.warn("the kernel is still closing it; until then it cannot be added again", error);
        this.closing = this.end
          .letGo()
          .catch((cause) => this.log.warn("not all of it could be let go of", asError(cause)));
      } finally {
        await this.end.forget();
        this.become({ name: "absent" });
      }
    });
    return this.closing === undefined ? await this.end.holder() : undefined;
  }

  /** Drops every live object without a word to anybody: what a crash does, in order. */
  async abandon(): Promise<void> {
    this.link[Symbol.dispose]();
    await this.frontEnds.abandon();
    this.target.abandon();
    this.parts.dataPath.abandon();
    this.parts.fn.abandon();
  }

  /** The record of this VF as it is now, and the fds that belong to it (borrowed). */
  snapshot(): VfSnapshot {
    const { options, held, underWay, rings, parts, link } = this;
    const shared = this.target.hasShared;
    // One that ends has nothing more to say.
    const session = underWay === "end" ? undefined : this.frontEnds.session;
    const more = { session: session?.snapshot(), frontEnds: { data: null, fds: this.frontEnds.fds } };
    return takeSnapshot({ options, held, underWay, shared, rings, link, ...parts, ...more });
  }

  async checkpoint(): Promise<void> {
    await this.around.keeper.put(this.key, () => this.snapshot());
  }

  /** As checkpoint, after what its session is at. Never rejects. */
  async note(): Promise<void> {
    if (this.end.hasBegun) await this.end.hollow();
    else await this.frontEnds.note();
  }

  /** Nothing is under way. */
  async settled(): Promise<void> {
    await this.operations.run(async () => {});
  }

  /** @throws VhostdError noDevice where the function failed, with the reason of that */
  private checkUsable(): void {
    if (this.current.name !== "failed") return;
    throw new VhostdError("noDevice", `the VF has failed: ${this.current.reason}`, {
      fix: "remove it and add it again",
    });
  }

  private get key(): string {
    return vfKey(this.address);
  }

  private become(next: VfState): void {
    checkTransition(this.current, next);
    this.current = next;
    this.around.onState(this);
  }

  /** Neither for a front-end nor at the link. */
  private lookNoMore(): void {
    this.frontEnds.stop();
    this.link[Symbol.dispose]();
  }

  private makeManual(): ManualStatus {
    const { address, parts, operations, patience } = this;
    return new ManualStatus({
      ...{ address, parts, operations, patience, log: this.log, deadlines: this.around.deadlines },
      state: () => this.current,
      checkUsable: () => this.checkUsable(),
      onMoved: (to) => {
        this.log.warn(`internal status changed by hand: ${to}`);
        this.isHeldIn(to === "running" ? undefined : to);
        this.around.onState(this);
      },
      note: () => this.note(),
    });
  }

  private makeTarget(): VfTarget {
    const { options, parts, log, rings, memory, patience, operations } = this;
    return new VfTarget({
      ...{ options, parts, log, rings, memory, patience, operations, deadlines: this.around.deadlines },
      state: () => this.current,
      become: (next) => this.become(next),
      checkUsable: () => this.checkUsable(),
      fail: (error) => this.fail(error),
      onRunning: async () => {
        this.frontEnds.ranWell();
        this.isHeldIn(undefined);
        await this.link.begin();
      },
      beforeReset: async () => {
        this.underWay = "reset";
        await this.checkpoint();
      },
      beforeEnd: async () => {
        this.underWay = "end";
        await this.checkpoint();
      },
      onReset: () => {
        if (this.underWay === "reset") this.underWay = undefined;
        this.isHeldIn(undefined);
      },
      onConfig: (config) => this.link.seen(config),
      onMigration: () => this.around.onMigration(this.address, this.target.migration.info),
      peer: () => this.frontEnds.session?.peer,
      checkpoint: () => this.checkpoint(),
      deliver: (delivery, change) => {
        const storing = storingOf(change, () => this.snapshot());
        return this.around.keeper.deliver?.(this.key, storing, delivery);
      },
    });
  }

  private makeLink(before: LinkBefore): Link {
    const { deviceClass, deviceFeatures } = this.target;
    const options = {
      ...{ deviceClass, deviceFeatures, log: this.log },
      readConfig: () => this.target.readConfig(),
      guest: () => (this.current.name === "running" ? this.frontEnds.session : undefined),
      canReconnect: () => this.parts.dataPath.capabilities.resumeAnywhere,
      onChange: () => this.around.onState(this),
      onRecord: () => void this.note(),
    };
    return new Link(options, before);
  }

  private async onSessionEnd({ reason, error }: SessionEnd): Promise<void> {
    this.target.onConfigChange(() => {});
    this.underWay = undefined;
    this.link.forget();
    this.trouble = error === undefined ? undefined : `the last session ended: ${sentence(error)}`;
    const { name } = this.current;
    if (name !== "idle" && name !== "failed")
      throw new VhostdError("io", `the function did not come to rest: ${reason}`);
    await this.memory.clearRest(this.log);
    if (this.current.name === "failed") return await this.end.hollow();
    this.around.onState(this);
    if (this.target.hasShared) this.around.renew(this.address);
    else await this.checkpoint();
  }

  private async onSessionFailure(error: Error): Promise<void> {
    await this.target.reset().catch(() => {});
    await this.memory.clearRest(this.log);
    this.fail(error);
  }

  /** The device asks for a reset, which is its driver's to do, or it is gone. */
  private onFailure({ gone, error }: DeviceFailure): void {
    if (gone) this.fail(error);
    else {
      this.trouble = error.message;
      this.around.onState(this);
      this.frontEnds.session?.needsReset(error.message);
    }
  }

  private fail(error: Error): void {
    const { name } = this.current;
    if (name === "failed" || name === "detaching" || name === "absent") return;
    this.log.error("failed (remove it and add it again)", error);
    this.become({ name: "failed", reason: error.message });
    this.lookNoMore();
    this.memory.giveUp();
    this.patience.hurry();
    this.parts.dataPath.abandon();
    // While it is being attached, who does that undoes it.
    if (name !== "attaching") void this.giveUp(error.message);
  }

  /** Nothing of a function that has failed is held: a kernel that wants it back waits for that. Never rejects. */
  private async giveUp(reason: string): Promise<void> {
    try {
      await this.frontEnds.close(reason);
      // An operator who removes it meanwhile does not wait behind a kernel that takes its time.
      const closed = await this.operations.run(async () => [this.end.letGo()]);
      await Promise.all(closed);
    } catch (error) {
      this.log.warn("not all of it could be let go of", asError(error));
    }
  }
}
