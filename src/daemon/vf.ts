import { setTimeout as pause } from "node:timers/promises";
import { Deadline } from "../base/deadline.ts";
import { asError, sentence, VhostdError } from "../base/errors.ts";
import type { Logger } from "../base/log.ts";
import { OperationQueue } from "../base/operation-queue.ts";
import type { OwnedFd } from "../native/fd.ts";
import { type PciAddress, parsePciAddress } from "../pci/address.ts";
import type { DmaRange } from "../pci/address-space.ts";
import type { BusEntry } from "../pci/bus.ts";
import type { DeviceClass } from "../plugin.ts";
import { Endpoint } from "../vhost-user/endpoint.ts";
import { Session } from "../vhost-user/session.ts";
import type { RingEventfds, SessionTarget } from "../vhost-user/target.ts";
import type { InternalStatusName } from "../virtio/admin/vendor.ts";
import { configValues } from "../virtio/config-space.ts";
import type { DataPathFailure } from "../virtio/data-path.ts";
import type { DeviceState } from "../virtio/device-state.ts";
import type { FreezeMode, ManualControl, StateMover } from "../virtio/mover.ts";
import type { RingMemory } from "../virtio/split-ring.ts";
import { OpenRings } from "./open-rings.ts";
import { Patience } from "./patience.ts";
import { closing, joinFds, RECORD_VERSION, type Snapshot, takeFds, type VfRecord } from "./record.ts";
import {
  openParts,
  reviveParts,
  startEndpoint,
  usableQueues,
  type VfMover,
  type VfOptions,
  type VfParts,
  type VfSurroundings,
  vmOf,
} from "./vf-parts.ts";
import { checkTransition, type VfState } from "./vf-state.ts";

type ManualStatus = Parameters<ManualControl["change"]>[0];

export interface VfManagement {
  readonly mover: StateMover["kind"];
  /** Its PF can freeze, save and restore it. */
  readonly managed: boolean;
  readonly unmanaged_reason: string | null;
}

/** One virtual function in the daemon's hands: its life cycle, and what a session may do with it. */
export class Vf implements SessionTarget {
  private current: VfState;
  private session: Session | undefined;
  private serving: Promise<void> = Promise.resolve();
  private backoff = 0;
  /** Why the device asks for a reset, or why the last front-end was turned away; undefined where all is well. */
  private trouble: string | undefined;
  private configHandler: () => void = () => {};
  private readonly operations = new OperationQueue();
  private readonly endpoint: Endpoint;
  private readonly log: Logger;
  private readonly stopping = new AbortController();
  private readonly patience: Patience;
  private moving = false;

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
  ) {
    this.current = state;
    this.log = around.log.child(`vf ${options.address}`);
    this.deviceClass = parts.deviceClass;
    this.deviceFeatures = parts.dataPath.features;
    this.queues = usableQueues(parts);
    this.patience = new Patience(around.deadlines.lastDrain);
    this.endpoint = new Endpoint(
      { path: options.socket, mode: options.mode },
      (connection) => this.serve((target, log) => new Session(connection, target, { log })),
      this.log,
    );
    parts.dataPath.onConfigChange(() => this.configHandler());
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
    rings = new OpenRings(),
  ): Promise<Vf> {
    const deadline = Deadline.after(around.deadlines.attach, `attaching ${options.address}`);
    await using undo = new AsyncDisposableStack();
    const parts = await openParts(options, entry, mover, around, undo, deadline);
    const vf = new Vf(options, parts, around, { name: "attaching" }, rings);
    undo.defer(() => vf.vanish());
    undo.defer(() => around.keeper.delete(vf.key));
    await vf.checkpoint();
    startEndpoint(vf.endpoint, options.socket);
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
    const vf = new Vf(options, parts, around, { name: "adopting" }, OpenRings.revive(record.rings));
    vf.become({ name: parts.dataPath.running ? "running" : "idle" });
    const { session } = record;
    startEndpoint(vf.endpoint, options.socket, session !== null);
    if (session !== null) {
      const own = takeFds(fds, "session");
      vf.serve((target, log) => Session.revive(target, session, own, { log }));
    }
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
    return this.session !== undefined;
  }

  /** What is wrong with the function or was with its last front-end, or null. */
  get reason(): string | null {
    if (this.current.name === "failed") return this.current.reason;
    if (this.trouble !== undefined) return this.trouble;
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
    return this.current.name === "running" ? (this.session?.status.features ?? null) : null;
  }

  /** What the class shows of the configuration space. */
  get columns(): Readonly<Record<string, string>> {
    const config = configValues(this.deviceClass.configSpace, this.parts.config);
    return this.deviceClass.describe?.(config, this.deviceFeatures) ?? {};
  }

  /** How its state is moved, and why not better. */
  get management(): VfManagement {
    const { dataPath, mover } = this.parts;
    const managed = dataPath.capabilities.resumeAnywhere;
    return { mover: dataPath.moverKind, managed, unmanaged_reason: managed ? null : mover.unmanagedReason() };
  }

  /**
   * Changes the internal status by hand, where `to` is given. @returns the status afterwards
   * @throws VhostdError notSupported where the VF is not managed; busy where no guest runs it: what stands in guest memory
   *   must not move then; quiesceFailed, freezeFailed, adminQueue
   */
  async move(to: ManualStatus | undefined): Promise<InternalStatusName> {
    if (this.moving)
      throw new VhostdError("busy", `the status of ${this.address} is being asked for or changed already`);
    this.moving = true;
    try {
      const { ask, drain } = this.around.deadlines;
      const what = `${to === undefined ? "the internal status" : "a change of the internal status"} of ${this.address}`;
      return await this.patience.during(what, to === undefined ? ask : drain, (deadline) =>
        this.operations.run(() => this.moveBy(to, deadline)),
      );
    } finally {
      this.moving = false;
    }
  }

  /** Ends the session, resets and closes the function. Whatever happens, the VF is gone afterwards. */
  async remove(): Promise<void> {
    this.stopping.abort();
    this.patience.hurry();
    this.endpoint[Symbol.dispose]();
    this.session?.close("the VF is being removed");
    await this.serving;
    await this.operations.run(async () => {
      this.become({ name: "detaching" });
      const { entry, fn, dataPath, domain } = this.parts;
      await using steps = new AsyncDisposableStack();
      steps.defer(() => this.become({ name: "absent" }));
      steps.defer(() => this.around.keeper.delete(this.key));
      steps.defer(() => this.around.domains.release(vmOf(this.options), entry.transport.kind));
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
    this.stopping.abort();
    this.endpoint[Symbol.dispose]();
    await this.session?.abandon();
    this.parts.dataPath.abandon();
    this.parts.fn.abandon();
  }

  /** The record of this VF as it is now, and the fds that belong to it (borrowed). */
  snapshot(): { record: VfRecord; fds: Map<string, number> } {
    const parts: Record<string, Snapshot | undefined> = {
      function: this.parts.fn.snapshot(),
      dataPath: this.parts.dataPath.snapshot(),
      session: this.session?.snapshot(),
    };
    return {
      record: {
        version: RECORD_VERSION,
        options: this.options,
        function: parts.function?.data ?? null,
        dataPath: parts.dataPath?.data ?? null,
        session: parts.session?.data ?? null,
        rings: this.rings.snapshot(),
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
    return config;
  }

  writeConfig(offset: number, bytes: Uint8Array): Promise<void> {
    return this.parts.dataPath.writeConfig(offset, bytes);
  }

  async mapMemory(range: DmaRange, fd: number): Promise<void> {
    await using undo = new AsyncDisposableStack();
    await this.parts.domain.claim(this.address, range, fd);
    undo.defer(() => this.parts.domain.release(this.address, range));
    await this.around.domains.checkpoint(vmOf(this.options), this.parts.entry.transport.kind);
    undo.move();
  }

  async unmapMemory(range: DmaRange): Promise<void> {
    await this.parts.domain.release(this.address, range);
    await this.around.domains.checkpoint(vmOf(this.options), this.parts.entry.transport.kind);
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
        this.backoff = 0;
        this.trouble = undefined;
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

  private async moveBy(to: ManualStatus | undefined, deadline: Deadline): Promise<InternalStatusName> {
    const { address } = this;
    this.checkUsable();
    const { manual } = this.parts.dataPath;
    if (manual === undefined) {
      const reason = this.parts.mover.unmanagedReason();
      throw new VhostdError("notSupported", `the state of ${address} cannot be moved: ${reason}`, {
        fix: '"vf -i" and "mgmtpf -l" show what the PF can do',
      });
    }
    if (to !== undefined && this.current.name !== "running") {
      throw new VhostdError("busy", `${address} is ${this.current.name}: its status is changed while a guest runs it`, {
        fix: "start its guest first, or let it go on",
      });
    }
    deadline.check();
    if (to !== undefined) {
      await manual.change(to, deadline);
      this.log.warn(`internal status changed by hand: ${to}`);
      this.trouble = to === "running" ? undefined : `${to} by hand, its guest waits (let it go on with "vf -d -o 1")`;
      this.around.onState(this);
    }
    return await manual.status(deadline);
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

  private async releaseMemory(): Promise<void> {
    await this.parts.domain.releaseAll(this.address);
    await this.around.domains.checkpoint(vmOf(this.options), this.parts.entry.transport.kind);
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

  /** What was begun is undone: the VF is not there. */
  private vanish(): void {
    this.endpoint[Symbol.dispose]();
    this.become({ name: "absent" });
  }

  private serve(begin: (target: SessionTarget, log: Logger) => Session): void {
    this.serving = this.runSession(begin).catch(async (thrown: unknown) => {
      const error = asError(thrown);
      // Nobody is left who would undo what the function still holds.
      await this.reset().catch(() => {});
      await this.releaseMemory().catch((cause) => this.log.error("guest memory stays mapped", cause));
      this.fail(error);
      await this.around.keeper.delete(this.key);
    });
  }

  private async runSession(begin: (target: SessionTarget, log: Logger) => Session): Promise<void> {
    const session = begin(this, this.log);
    this.session = session;
    const end = await session.run();
    this.session = undefined;
    this.configHandler = () => {};
    this.trouble = end.error === undefined ? undefined : `the last session ended: ${sentence(end.error)}`;
    const { firstBackoff, longestBackoff } = this.around.deadlines;
    if (end.error !== undefined) this.backoff = Math.min(longestBackoff, Math.max(firstBackoff, this.backoff * 2));
    if (this.current.name === "failed") return await this.around.keeper.delete(this.key);
    if (this.current.name !== "idle") throw new VhostdError("io", `the function did not come to rest: ${end.reason}`);
    this.around.onState(this);
    await this.checkpoint();
    await pause(this.backoff, undefined, { signal: this.stopping.signal }).catch(() => {});
    this.endpoint.markFree();
  }

  /** The device asks for a reset, which is its driver's to do, or it is gone. */
  private onFailure({ gone, error }: DataPathFailure): void {
    if (gone) {
      this.fail(error);
      this.session?.close(error.message);
    } else {
      this.trouble = error.message;
      this.session?.needsReset(error.message);
    }
  }

  private fail(error: Error): void {
    if (this.current.name === "failed" || this.current.name === "detaching" || this.current.name === "absent") return;
    this.log.error("failed (remove it and add it again)", error);
    this.become({ name: "failed", reason: error.message });
    this.endpoint[Symbol.dispose]();
    this.parts.dataPath.abandon();
  }
}

function optionsOf(record: VfRecord): VfOptions {
  const { address, socket, mode, uuid } = record.options;
  return { address: parsePciAddress(address), socket, mode, ...(uuid === undefined ? {} : { uuid }) };
}
