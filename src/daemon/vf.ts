import { Deadline } from "../base/deadline.ts";
import { asError, sentence, VhostdError } from "../base/errors.ts";
import type { Logger } from "../base/log.ts";
import { OperationQueue } from "../base/operation-queue.ts";
import type { OwnedFd } from "../native/fd.ts";
import type { PciAddress } from "../pci/address.ts";
import type { DmaRange } from "../pci/address-space.ts";
import type { BusEntry } from "../pci/bus.ts";
import type { QueueStats } from "../pci/function.ts";
import type { DeviceClass } from "../plugin.ts";
import type { SessionEnd } from "../vhost-user/session.ts";
import type { RingEventfds, SessionTarget } from "../vhost-user/target.ts";
import type { InternalStatusName } from "../virtio/admin/vendor.ts";
import type { DataPathFailure } from "../virtio/data-path.ts";
import type { DeviceState } from "../virtio/device-state.ts";
import type { FreezeMode, StateMover } from "../virtio/mover.ts";
import type { RingMemory } from "../virtio/split-ring.ts";
import { configColumns } from "./config-columns.ts";
import { FrontEnds } from "./front-ends.ts";
import { Link, type LinkBefore } from "./link.ts";
import { ManualStatus, type ManualTarget } from "./manual-status.ts";
import { OpenRings } from "./open-rings.ts";
import { Patience } from "./patience.ts";
import { askQueueStats } from "./queue-statistics.ts";
import { closing, joinFds, optionsOf, RECORD_VERSION, type Snapshot, takeFds, type VfRecord } from "./record.ts";
import { VfMemory } from "./vf-memory.ts";
import {
  openParts,
  reviveParts,
  usableQueues,
  type VfMover,
  type VfOptions,
  type VfParts,
  type VfSurroundings,
  vmOf,
} from "./vf-parts.ts";
import { checkTransition, type VfState } from "./vf-state.ts";

export interface VfManagement {
  readonly mover: StateMover["kind"];
  /** Its PF can freeze, save and restore it. */
  readonly managed: boolean;
  readonly unmanaged_reason: string | null;
}

/** One virtual function in the daemon's hands: its life cycle, and what a session may do with it. */
export class Vf implements SessionTarget {
  private current: VfState;
  /** Why the device asks for a reset, or why the last front-end was turned away; undefined where all is well. */
  private trouble: string | undefined;
  private configHandler: () => void = () => {};
  private readonly operations = new OperationQueue();
  private readonly log: Logger;
  private readonly frontEnds: FrontEnds;
  private readonly patience: Patience;
  private readonly manual: ManualStatus;
  private readonly memory: VfMemory;
  private readonly link: Link;

  readonly deviceClass: DeviceClass;
  readonly deviceFeatures: bigint;
  readonly queues: number;
  readonly dirtyTracking = false;

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
    this.deviceClass = parts.deviceClass;
    this.deviceFeatures = parts.dataPath.features;
    this.queues = usableQueues(parts);
    this.patience = new Patience(around.deadlines.lastDrain);
    this.manual = this.makeManual();
    this.memory = new VfMemory(options.address, parts.domain, () =>
      around.domains.checkpoint(vmOf(options), parts.entry.transport.kind),
    );
    this.link = this.makeLink(link);
    this.frontEnds = new FrontEnds({
      place: options,
      deadlines: around.deadlines,
      log: this.log,
      target: this,
      welcomes: (pid) => this.link.welcomes(pid),
      onEnd: (end) => this.onSessionEnd(end),
      onFailure: (error) => this.onSessionFailure(error),
    });
    parts.dataPath.onConfigChange(() => {
      this.configHandler();
      void this.link.look();
    });
    parts.dataPath.onFailure((reason) => this.onFailure(reason));
  }

  /**
   * Opens the function, resets it and begins to look for the front-end.
   * @param rings what is known of the rings that it ran when it was here before
   * @throws VhostdError; nothing is left behind then
   */
  static async attach(
    options: VfOptions,
    entry: BusEntry,
    mover: VfMover,
    around: VfSurroundings,
    rings?: OpenRings,
  ): Promise<Vf> {
    const deadline = Deadline.after(around.deadlines.attach, `attaching ${options.address}`);
    await using undo = new AsyncDisposableStack();
    const parts = await openParts(options, entry, mover, around, undo, deadline);
    const own = rings ?? new OpenRings(parts.deviceClass);
    const vf = new Vf(options, parts, around, { name: "attaching" }, own, parts);
    undo.defer(() => around.keeper.delete(vf.key));
    undo.defer(() => vf.vanish());
    await vf.checkpoint();
    vf.frontEnds.start();
    vf.become({ name: "idle" });
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
    else vf.frontEnds.revive(session, takeFds(fds, "session"));
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
    if (this.current.name === "failed") return this.current.reason;
    const trouble = this.trouble ?? this.link.trouble;
    if (trouble !== undefined) return trouble;
    // A guest that runs may do without the queues that were lost.
    return (this.current.name === "running" ? undefined : this.rings.trouble) ?? null;
  }

  get vectors(): number {
    return this.parts.fn.interrupts.count;
  }

  /** The physical function that this VF belongs to. */
  get pf(): PciAddress | undefined {
    return this.parts.entry.physfn;
  }

  /** Driver features of the front-end that runs now, or null. */
  get driverFeatures(): bigint | null {
    return this.current.name === "running" ? (this.frontEnds.session?.status.features ?? null) : null;
  }

  /** What the class shows of the configuration space. */
  get columns(): Readonly<Record<string, string>> {
    return configColumns(this.deviceClass, this.parts.config, this.deviceFeatures, this.log);
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
    const time = this.around.deadlines.stats;
    const config = Deadline.after(time, `the configuration of ${this.address}`).race(this.readConfig());
    const [all] = await Promise.all([askQueueStats(this.parts.fn, time, this.log), config.catch(() => {})]);
    return all?.slice(0, this.queues) ?? null;
  }

  /** Ends the session, resets and closes the function. Whatever happens, the VF is gone afterwards. */
  async remove(): Promise<void> {
    this.patience.hurry();
    this.link[Symbol.dispose]();
    await this.frontEnds.close("the VF is being removed");
    await this.operations.run(async () => {
      this.become({ name: "detaching" });
      const { entry, fn, dataPath, domain, releaseControl } = this.parts;
      await using steps = new AsyncDisposableStack();
      steps.defer(() => this.become({ name: "absent" }));
      steps.defer(() => this.around.keeper.delete(this.key));
      steps.defer(() => this.around.domains.release(vmOf(this.options), entry.transport.kind));
      steps.defer(releaseControl);
      steps.use(fn);
      steps.defer(() => domain.detach(fn));
      steps.defer(() => dataPath.abandon());
      await dataPath.reset(Deadline.after(this.around.deadlines.detach, `reset of ${this.address}`)).catch((error) => {
        this.log.warn("the last reset failed; the function is closed all the same", error);
      });
    });
  }

  /** Drops every live object without a word to the function or the front-end: what a crash does, in order. */
  async abandon(): Promise<void> {
    this.link[Symbol.dispose]();
    await this.frontEnds.abandon();
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

  // What a session may do (SessionTarget).

  queueSizeMax(index: number): number {
    return this.parts.dataPath.queueSizeMax(index);
  }

  async readConfig(): Promise<Uint8Array> {
    const config = await this.parts.dataPath.readConfig(this.parts.config.length);
    this.parts.config.set(config);
    this.link.seen(config);
    return config;
  }

  writeConfig(offset: number, bytes: Uint8Array): Promise<void> {
    return this.parts.dataPath.writeConfig(offset, bytes);
  }

  mapMemory(range: DmaRange, fd: number): Promise<void> {
    return this.memory.map(range, fd);
  }

  unmapMemory(range: DmaRange): Promise<void> {
    return this.memory.unmap(range);
  }

  start(wanted: DeviceState, eventfds: ReadonlyMap<number, RingEventfds>): Promise<void> {
    return this.operations.run(async () => {
      this.checkUsable();
      this.rings.begin(wanted);
      this.become({ name: "configuring" });
      try {
        await this.parts.dataPath.start(
          wanted,
          eventfds,
          Deadline.after(this.around.deadlines.start, `start of ${this.address}`),
        );
        this.become({ name: "running" });
        this.frontEnds.ranWell();
        this.trouble = undefined;
        await this.link.begin();
      } catch (error) {
        this.checkUsable();
        this.become({ name: "stopping" });
        this.become({ name: "idle" });
        throw error;
      }
    });
  }

  stop(memory: RingMemory, mode: FreezeMode): Promise<DeviceState> {
    return this.operations.run(async () => {
      this.checkUsable();
      this.become({ name: "stopping" });
      const state = await this.drain((deadline) => this.parts.dataPath.stop(memory, mode, deadline));
      this.rings.stopped(state);
      this.checkUsable();
      this.become({ name: "idle" });
      return state;
    });
  }

  reset(): Promise<void> {
    return this.operations.run(async () => {
      await this.comeToRest();
      this.rings.givenUp();
    });
  }

  release(memory: RingMemory): Promise<void> {
    return this.operations.run(async () => {
      const { dataPath } = this.parts;
      const { name } = this.current;
      // From "stopping" where a stop has failed: the device may have come to its senses.
      if ((name === "running" || name === "stopping") && dataPath.moverKind !== "registers") {
        if (name === "running") this.become({ name: "stopping" });
        try {
          await this.drain((deadline) => this.giveBack(memory, deadline), name === "stopping");
        } catch (error) {
          this.log.warn("what the function had taken is not all given back", asError(error));
        }
      }
      await this.comeToRest();
      this.rings.reset(memory);
    });
  }

  enable(queues: ReadonlySet<number>, eventfds: ReadonlyMap<number, RingEventfds>, memory: RingMemory): Promise<void> {
    return this.operations.run(async () => {
      this.checkUsable();
      await this.drain((deadline) => this.parts.dataPath.enable(queues, eventfds, memory, deadline));
    });
  }

  setKick(queue: number, fd: number | null): Promise<void> {
    return this.parts.dataPath.setKick(queue, fd);
  }

  setCall(queue: number, fd: number | null): Promise<void> {
    return this.parts.dataPath.setCall(queue, fd);
  }

  onConfigChange(handler: () => void): void {
    this.configHandler = handler;
  }

  async checkpoint(): Promise<void> {
    await this.around.keeper.put(this.key, () => this.snapshot());
  }

  /** @param again it has been tried before: there is as little time as at the last */
  private drain<T>(work: (deadline: Deadline) => Promise<T>, again = false): Promise<T> {
    const { drain, lastDrain } = this.around.deadlines;
    const time = again ? Math.min(drain, lastDrain) : drain;
    return this.patience.during(`${this.address} giving back what it has taken`, time, work);
  }

  private async giveBack(memory: RingMemory, deadline: Deadline): Promise<void> {
    const { dataPath } = this.parts;
    // A device that can only be drained, not frozen, comes to no end while its guest goes on.
    if (!dataPath.capabilities.resumeAnywhere) await dataPath.mute(deadline);
    this.rings.stopped(await dataPath.stop(memory, "drained", deadline));
  }

  private async comeToRest(): Promise<void> {
    if (this.current.name === "failed") return;
    if (this.current.name === "running") this.become({ name: "stopping" });
    try {
      await this.parts.dataPath.reset(Deadline.after(this.around.deadlines.reset, `reset of ${this.address}`));
    } catch (error) {
      this.fail(asError(error));
      throw error;
    }
    this.trouble = undefined;
    if (this.current.name === "stopping") this.become({ name: "idle" });
  }

  /** @throws VhostdError noDevice where the function failed, with the reason of that */
  private checkUsable(): void {
    if (this.current.name !== "failed") return;
    throw new VhostdError("noDevice", `the VF has failed: ${this.current.reason}`, {
      fix: "remove it and add it again",
    });
  }

  private get key(): string {
    return `vf/${this.address}`;
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

  private makeLink(before: LinkBefore): Link {
    const { deviceClass, deviceFeatures, log } = this;
    const options = {
      ...{ deviceClass, deviceFeatures, log },
      readConfig: () => this.readConfig(),
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
    this.configHandler = () => {};
    this.link.forget();
    this.trouble = error === undefined ? undefined : `the last session ended: ${sentence(error)}`;
    if (this.current.name === "failed") return await this.around.keeper.delete(this.key);
    if (this.current.name !== "idle") throw new VhostdError("io", `the function did not come to rest: ${reason}`);
    this.around.onState(this);
    await this.checkpoint();
  }

  private async onSessionFailure(error: Error): Promise<void> {
    await this.reset().catch(() => {});
    await this.memory.clear().catch((cause) => this.log.error("guest memory stays mapped", cause));
    this.fail(error);
    await this.around.keeper.delete(this.key);
  }

  /** The device asks for a reset, which is its driver's to do, or it is gone. */
  private onFailure({ gone, error }: DataPathFailure): void {
    if (gone) {
      this.fail(error);
      this.frontEnds.session?.close(error.message);
    } else {
      this.trouble = error.message;
      this.frontEnds.session?.needsReset(error.message);
    }
  }

  private fail(error: Error): void {
    if (this.current.name === "failed" || this.current.name === "detaching" || this.current.name === "absent") return;
    this.log.error("failed (remove it and add it again)", error);
    this.become({ name: "failed", reason: error.message });
    this.lookNoMore();
    this.parts.dataPath.abandon();
  }
}
