import { Deadline } from "../base/deadline.ts";
import { asError, sentence, VhostdError } from "../base/errors.ts";
import type { Logger } from "../base/log.ts";
import { OperationQueue } from "../base/operation-queue.ts";
import type { OwnedFd } from "../native/fd.ts";
import type { PciAddress } from "../pci/address.ts";
import type { BusEntry } from "../pci/bus.ts";
import type { DmaDomain } from "../pci/dma-domain.ts";
import type { QueueStats } from "../pci/function.ts";
import type { SessionEnd } from "../vhost-user/session.ts";
import type { InternalStatusName } from "../virtio/admin/vendor.ts";
import type { DeviceFailure } from "../virtio/device-watch.ts";
import type { StateMover } from "../virtio/mover.ts";
import { configColumns } from "./config-columns.ts";
import { FrontEnds } from "./front-ends.ts";
import { Link, type LinkBefore } from "./link.ts";
import { ManualStatus, type ManualTarget } from "./manual-status.ts";
import { OpenRings } from "./open-rings.ts";
import { Patience } from "./patience.ts";
import { askQueueStats } from "./queue-statistics.ts";
import { closing, joinFds, optionsOf, RECORD_VERSION, type Snapshot, takeFds, type VfRecord } from "./record.ts";
import type { VfBefore } from "./renewal.ts";
import { VfMemory } from "./vf-memory.ts";
import {
  closeParts,
  openParts,
  reviveParts,
  type VfMover,
  type VfOptions,
  type VfParts,
  type VfSurroundings,
  vfKey,
  vmOf,
} from "./vf-parts.ts";
import { checkTransition, type VfState } from "./vf-state.ts";
import { VfTarget } from "./vf-target.ts";

export interface VfManagement {
  readonly mover: StateMover["kind"];
  /** Its PF can freeze, save and restore it. */
  readonly managed: boolean;
  readonly unmanaged_reason: string | null;
}

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
  private lettingGo: Promise<void> | undefined;
  /** After `remove`: settles when the function is closed, where that goes on still. */
  closing: Promise<void> | undefined;
  /** What a session may do with it. */
  readonly target: VfTarget;

  private constructor(
    readonly options: VfOptions,
    private readonly parts: VfParts,
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
    this.memory = new VfMemory(options.address, parts.domain, () =>
      around.domains.checkpoint(vmOf(options), parts.entry.transport.kind),
    );
    this.target = this.makeTarget();
    this.link = this.makeLink(link);
    this.frontEnds = new FrontEnds({
      place: options,
      deadlines: around.deadlines,
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
    const rings = before.rings ?? new OpenRings(parts.deviceClass);
    const link = before.link === undefined ? parts : { record: before.link };
    const vf = new Vf(options, parts, around, { name: "attaching" }, rings, link);
    vf.trouble = before.trouble;
    if (before.migration !== undefined) vf.target.migration.follows(before.migration);
    undo.defer(() => around.keeper.delete(vf.key));
    undo.defer(() => vf.vanish());
    await vf.checkpoint();
    // It may have got lost meanwhile.
    vf.checkUsable();
    vf.frontEnds.start();
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
    entry: BusEntry,
    record: VfRecord,
    fds: Map<string, OwnedFd>,
    mover: VfMover,
    around: VfSurroundings,
  ): Promise<Vf> {
    using _unused = closing(fds);
    const options = optionsOf(record);
    await using undo = new AsyncDisposableStack();
    const parts = await reviveParts(options, entry, record, fds, mover, around, undo);
    const rings = OpenRings.revive(record.rings, parts.deviceClass);
    const vf = new Vf(options, parts, around, { name: "adopting" }, rings, { record: record.link });
    vf.become({ name: parts.dataPath.running ? "running" : "idle" });
    const { session } = record;
    if (session === null) vf.frontEnds.start();
    else {
      vf.frontEnds.revive(session, takeFds(fds, "session"));
      vf.target.migration.joined(vf.frontEnds.session?.peer);
    }
    if (vf.frontEnds.session?.isBehind === true) void vf.manual.letGoOn();
    // Nobody was there to be told of a change.
    void vf.link.look();
    undo.move();
    return vf;
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

  get vectors(): number {
    return this.parts.fn.interrupts.count;
  }

  /** As its bus described it when it was added. */
  get entry(): BusEntry {
    return this.parts.entry;
  }

  /** Which of the kernel's interfaces it is reached by; undefined where there is no choice. */
  get interface(): DmaDomain["interface"] {
    return this.parts.domain.interface;
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
    const { dataPath, mover } = this.parts;
    const managed = dataPath.capabilities.resumeAnywhere;
    return { mover: dataPath.moverKind, managed, unmanaged_reason: managed ? null : mover.unmanagedReason() };
  }

  /** Changes the internal status by hand, where `to` is given. @returns the status afterwards */
  move(to: ManualTarget | undefined): Promise<InternalStatusName> {
    return this.manual.move(to);
  }

  /**
   * What the queues of its guest have done; null where the function does not count, or does not say so soon. Its
   * configuration is read, too: where no driver runs it, it tells nobody of changes.
   */
  async queueStats(): Promise<readonly QueueStats[] | null> {
    if (this.current.name === "failed" || this.lettingGo !== undefined) return null;
    const time = this.around.deadlines.stats;
    const config = Deadline.after(time, `the configuration of ${this.address}`).race(this.target.readConfig());
    const [all] = await Promise.all([askQueueStats(this.parts.fn, time, this.log), config.catch(() => {})]);
    return all?.slice(0, this.target.queues) ?? null;
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
    const closed = await this.operations.run(async () => [this.letGo()]);
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
        if (!hasFailed && this.lettingGo === undefined) await this.lastReset();
        const what = `closing ${this.address}`;
        await Deadline.after(this.around.deadlines.close, what).race(this.letGo());
      } catch (error) {
        if (!(error instanceof VhostdError && error.code === "timedOut")) throw error;
        this.log.warn("the kernel is still closing it; until then it cannot be added again", error);
        this.closing = this.letGo().catch((cause) => this.log.warn("not all of it could be let go of", asError(cause)));
      } finally {
        this.become({ name: "absent" });
      }
    });
    return await this.warnOfHolder();
  }

  /** Drops every live object without a word to the function or the front-end: what a crash does, in order. */
  async abandon(): Promise<void> {
    this.link[Symbol.dispose]();
    await this.frontEnds.abandon();
    this.target.abandon();
    this.parts.dataPath.abandon();
    this.parts.fn.abandon();
  }

  /** The record of this VF as it is now, and the fds that belong to it (borrowed). */
  snapshot(): { record: VfRecord; fds: Map<string, number> } {
    const parts: Record<string, Snapshot | undefined> = {
      function: this.parts.fn.snapshot(),
      dataPath: this.parts.dataPath.snapshot(),
      session: this.frontEnds.session?.snapshot(),
    };
    return {
      record: {
        version: RECORD_VERSION,
        options: this.options,
        function: parts.function?.data ?? null,
        dataPath: parts.dataPath?.data ?? null,
        session: parts.session?.data ?? null,
        rings: this.rings.snapshot(),
        link: this.link.snapshot(),
      },
      fds: joinFds(parts),
    };
  }

  async checkpoint(): Promise<void> {
    await this.around.keeper.put(this.key, () => this.snapshot());
  }

  /** @throws VhostdError noDevice where the function failed, with the reason of that */
  private checkUsable(): void {
    if (this.current.name !== "failed") return;
    throw new VhostdError("noDevice", `the VF has failed: ${this.current.reason}`, {
      fix: "remove it and add it again",
    });
  }

  private async warnOfHolder(): Promise<string | undefined> {
    if (!this.target.hasShared || this.closing !== undefined) return undefined;
    const deadline = Deadline.after(this.around.deadlines.detach, `finding out who holds ${this.address}`);
    const holder = await this.around.stillHeld(this.entry, deadline);
    if (holder === undefined) return undefined;
    const warning = `${holder}; until that ends it can be used with the memory that is mapped for its VM`;
    this.log.warn(warning);
    return warning;
  }

  private async lastReset(): Promise<void> {
    const deadline = Deadline.after(this.around.deadlines.detach, `reset of ${this.address}`);
    await this.parts.dataPath.reset(deadline).catch((error) => {
      this.log.warn("the last reset failed; the function is closed all the same", error);
    });
  }

  /** Closes the function, once; nothing of it is left in this process, nor with the keeper. */
  private letGo(): Promise<void> {
    this.lettingGo ??= closeParts(this.options, this.parts, this.around, async () => {
      // As long as a front-end maps a doorbell, the kernel has the function open and does not reset it by itself.
      if (!this.target.hasShared) return;
      const deadline = Deadline.after(this.around.deadlines.detach, `function-level reset of ${this.address}`);
      // The kernel would wait for it, and hold it open meanwhile.
      if (!(await this.parts.dataPath.answers(deadline))) return;
      await this.parts.fn.reset(deadline).catch((error) => {
        this.log.warn("the kernel could not reset it; it stays at status 0, kept from memory", error);
      });
    });
    return this.lettingGo;
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
        this.trouble = to === "running" ? undefined : `${to} by hand, its guest waits (let it go on with "vf -d -o 1")`;
        this.around.onState(this);
      },
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
        this.trouble = undefined;
        await this.link.begin();
      },
      onReset: () => {
        this.trouble = undefined;
      },
      onConfig: (config) => this.link.seen(config),
      onMigration: () => this.around.onMigration(this.address, this.target.migration.info),
      peer: () => this.frontEnds.session?.peer,
      checkpoint: () => this.checkpoint(),
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
      onRecord: () => this.frontEnds.note(),
    };
    return new Link(options, before);
  }

  /** What was begun is undone: the VF is not there. */
  private vanish(): void {
    this.lookNoMore();
    this.become({ name: "absent" });
  }

  private async onSessionEnd({ reason, error }: SessionEnd): Promise<void> {
    this.target.onConfigChange(() => {});
    this.link.forget();
    this.trouble = error === undefined ? undefined : `the last session ended: ${sentence(error)}`;
    if (this.current.name === "failed") return await this.around.keeper.delete(this.key);
    if (this.current.name !== "idle") throw new VhostdError("io", `the function did not come to rest: ${reason}`);
    this.around.onState(this);
    if (this.target.hasShared) this.around.renew(this.address);
    else await this.checkpoint();
  }

  private async onSessionFailure(error: Error): Promise<void> {
    await this.target.reset().catch(() => {});
    await this.memory.clear().catch((cause) => this.log.error("guest memory stays mapped", cause));
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
    if (name !== "attaching" && name !== "adopting") void this.giveUp(error.message);
  }

  /** Nothing of a function that has failed is held: a kernel that wants it back waits for that. Never rejects. */
  private async giveUp(reason: string): Promise<void> {
    try {
      await this.frontEnds.close(reason);
      // An operator who removes it meanwhile does not wait behind a kernel that takes its time.
      const closed = await this.operations.run(async () => [this.letGo()]);
      await Promise.all(closed);
    } catch (error) {
      this.log.warn("not all of it could be let go of", asError(error));
    }
  }
}
