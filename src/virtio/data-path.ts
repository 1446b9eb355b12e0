import { both } from "../base/both.ts";
import { Deadline } from "../base/deadline.ts";
import { asError, VhostdError } from "../base/errors.ts";
import type { Json } from "../base/json.ts";
import type { OwnedFd } from "../native/fd.ts";
import { type Watch, watch } from "../native/poller.ts";
import { drainEventfd, eventfd, signalEventfd } from "../native/sys.ts";
import type { DmaDomain } from "../pci/dma-domain.ts";
import type { Doorbell, FunctionSnapshot, PciFunction } from "../pci/function.ts";
import type { ConfigValues, DeviceClass } from "../plugin.ts";
import { Calls } from "./calls.ts";
import { CONFIG_VECTOR, completeState } from "./complete-state.ts";
import { type ControlDevice, ControlQueue } from "./control-queue.ts";
import { moverData, parseDataPathRecord } from "./data-path-record.ts";
import { type DeviceState, disabledQueues } from "./device-state.ts";
import { type DeviceFailure, DeviceWatch } from "./device-watch.ts";
import type { Tracking } from "./dirty-log.ts";
import { featureBits } from "./features.ts";
import { Kicks } from "./kicks.ts";
import type {
  FreezeMode,
  ManualControl,
  MoverCapabilities,
  MoverFactory,
  MoverHost,
  MoverSnapshot,
  StateMover,
  StopNote,
} from "./mover.ts";
import { RegistersMover } from "./movers/registers.ts";
import { ownFeatures, type QueueLimits, VirtioPciDevice } from "./pci-device.ts";
import type { RingMemory } from "./split-ring.ts";

const CONFIG_INTERRUPT = "config-interrupt";
const CONTROL_MEMORY = "control";

/** Milliseconds to bring the device to rest after a start that failed. */
const CLEAN_UP_TIMEOUT = 5000;

const registersMover: MoverFactory = (host, snapshot) => new RegistersMover(host, snapshot);

/** The class of a device by its virtio device id. @throws VhostdError probeFailed where nothing serves it */
export type ClassLookup = (virtioId: number) => DeviceClass;

/** The eventfds of one ring, borrowed; undefined where there is none. */
export interface QueueEventfds {
  readonly kick: number | undefined;
  readonly call: number | undefined;
}

type ConnectableQueue = QueueEventfds & { readonly index: number };

/**
 * One VF between a front-end's eventfds and the device: kicks to doorbells, vectors to calls, and the state that the
 * mover brings in and out. The guest's data never comes here.
 */
export class DataPath {
  private readonly mover: StateMover;
  private readonly watch: Watch;
  private readonly health: DeviceWatch;
  private readonly kicks = new Kicks((queue) => this.doorbell(queue));
  private readonly calls: Calls;
  private readonly doorbells = new Map<number, Doorbell>();
  /** Queues that are set up: their calls are routed. */
  private active = new Set<number>();
  /** Those of them that the device is not to use. */
  private disabled = new Set<number>();
  /** The function's own. */
  private control: ControlQueue | undefined;
  private configHandler: () => void = () => {};
  private noticeHandler: (text: string) => void = () => {};
  private closed = false;

  private constructor(
    private readonly device: VirtioPciDevice,
    /** All 64 feature bits that the function offers. */
    readonly features: bigint,
    private readonly limits: readonly QueueLimits[],
    readonly deviceClass: DeviceClass,
    private readonly configInterrupt: OwnedFd,
    makeMover: MoverFactory,
    snapshot: MoverSnapshot,
  ) {
    const host: MoverHost = {
      device,
      features,
      limits,
      deviceClass,
      control: () => this.control,
      ringDoorbell: (queue) => this.ring(queue),
      log: (text) => this.noticeHandler(text),
    };
    this.mover = makeMover(host, snapshot);
    this.calls = new Calls(device.fn.interrupts);
    this.watch = watch(configInterrupt.number, "in", () => void this.onConfigInterrupt());
    this.health = new DeviceWatch(device, () => this.running);
  }

  /**
   * Probes a function and resets it.
   * @throws VhostdError probeFailed, resetTimedOut, noVectors
   */
  static async open(
    fn: PciFunction,
    classOf: ClassLookup,
    deadline: Deadline,
    makeMover = registersMover,
  ): Promise<DataPath> {
    const device = await VirtioPciDevice.probe(fn, deadline);
    const deviceClass = classOf(device.virtioId);
    if (fn.interrupts.count === 0) {
      throw new VhostdError("noVectors", `${fn.address} has no MSI-X vectors`, {
        fix: "provision the function with one vector for each queue and one more",
      });
    }
    await device.reset(deadline);
    using undo = new DisposableStack();
    const interrupt = undo.use(eventfd());
    const [features, limits] = await deadline.race(
      Promise.all([device.features(), device.queueLimits(), fn.interrupts.route(CONFIG_VECTOR, interrupt.number)]),
    );
    const path = new DataPath(device, features, limits, deviceClass, interrupt, makeMover, { kind: "reset" });
    undo.move();
    await path.mover.prove?.(deadline);
    return path;
  }

  /**
   * Goes on with a data path as another process left it, without a word to the device. Takes the fds.
   * @throws VhostdError invalid where the record or the fds do not fit; probeFailed
   */
  static revive(
    fn: PciFunction,
    data: Json,
    fds: Map<string, OwnedFd>,
    classOf: ClassLookup,
    makeMover: MoverFactory = registersMover,
  ): DataPath {
    using undo = new DisposableStack();
    for (const fd of fds.values()) undo.use(fd);
    const record = parseDataPathRecord(data);
    const interrupt = fds.get(CONFIG_INTERRUPT);
    if (interrupt === undefined) throw new VhostdError("invalid", `the record of ${fn.address} lacks its interrupt`);
    const device = new VirtioPciDevice(fn, record.layout);
    const { features, limits, mover } = record;
    const deviceClass = classOf(device.virtioId);
    const path = new DataPath(device, BigInt(features), limits, deviceClass, interrupt, makeMover, mover);
    undo.defer(() => path.abandon());
    path.active = new Set(record.queues);
    if (mover.kind !== "reset") path.disabled = disabledQueues(mover.state);
    if (record.control !== undefined) {
      const memory = fds.get(CONTROL_MEMORY);
      if (memory === undefined) {
        throw new VhostdError("invalid", `the record of ${fn.address} lacks the memory of its control queue`);
      }
      path.control = ControlQueue.revive(path.controlDevice, record.control, memory);
    }
    for (const queue of record.queues) {
      const kick = fds.get(`kick.${queue}`);
      if (kick !== undefined) path.kicks.adopt(queue, kick);
    }
    const known = path.kicks.size + (path.control === undefined ? 1 : 2);
    if (fds.size !== known) throw new VhostdError("invalid", `the record of ${fn.address} has spare fds`);
    undo.move();
    return path;
  }

  /** Queues of the device. */
  get queues(): number {
    return this.limits.length;
  }

  get vectors(): number {
    return this.device.fn.interrupts.count;
  }

  get moverKind(): StateMover["kind"] {
    return this.mover.kind;
  }

  get capabilities(): MoverCapabilities {
    return this.mover.capabilities;
  }

  /** The device's internal status by hand; undefined where it is not managed. */
  get manual(): ManualControl | undefined {
    return this.mover.manual;
  }

  /** The device uses guest memory. */
  get running(): boolean {
    return this.mover.snapshot().kind === "running";
  }

  /** Index of the function's own control queue, where it has one. */
  get controlQueue(): number | undefined {
    return this.control?.index;
  }

  /** Largest ring of a queue, entries; 0 where there is no such queue. */
  queueSizeMax(index: number): number {
    return this.limits[index]?.sizeMax ?? 0;
  }

  /** Bytes that the device does not have are 0. */
  readConfig(length: number): Promise<Uint8Array> {
    return this.device.readConfig(length);
  }

  writeConfig(offset: number, bytes: Uint8Array): Promise<void> {
    return this.device.writeConfig(offset, bytes);
  }

  /** The device says that its configuration space changed. Replaces the earlier handler. */
  onConfigChange(handler: () => void): void {
    this.configHandler = handler;
  }

  /** Something was worth a line in the log. Replaces the earlier handler. */
  onNotice(handler: (text: string) => void): void {
    this.noticeHandler = handler;
  }

  /** Replaces the earlier handler, which is told soon where the function is gone already. */
  onFailure(handler: (failure: DeviceFailure) => void): void {
    this.health.onFailure(handler);
  }

  /** The doorbell of a queue could be given away: nothing else is in its page, and the function lets it be mapped. */
  canShareDoorbell(queue: number): boolean {
    const { page } = this.doorbell(queue);
    return page !== undefined && this.device.ownsDoorbellPage(queue, this.limits, page.size);
  }

  /** The doorbell of a queue, to be given away; undefined where it cannot be. */
  shareDoorbell(queue: number): ReturnType<Doorbell["share"]> {
    return this.canShareDoorbell(queue) ? this.doorbell(queue).share() : undefined;
  }

  /**
   * Gives the function's own control queue its memory, where it has such a queue. Before the first start.
   * @param owner who holds the memory in the domain from then on
   * @throws VhostdError probeFailed, iommuDomain
   */
  async openControl(domain: DmaDomain, owner: string, config: ConfigValues): Promise<void> {
    const index = this.deviceClass.control?.queue(config, this.features);
    if (index === undefined) return;
    this.control = await ControlQueue.open(this.controlDevice, index, this.limits, domain, owner);
  }

  /**
   * Configures the device and lets it run. Every doorbell and every call is rung once at the end, unless its queue is
   * disabled: a signal may have been lost before. Vectors are assigned here, whatever `wanted` says.
   * @param eventfds by queue, borrowed for the call
   * @throws VhostdError; the device is reset and nothing is connected then. With resetTimedOut
   *   the device did not come to rest
   */
  async start(wanted: DeviceState, eventfds: ReadonlyMap<number, QueueEventfds>, deadline: Deadline): Promise<void> {
    using _change = this.health.change();
    if (this.running) throw new VhostdError("invalid", `${this.device.fn.address} is running already`);
    const state = this.complete(wanted);
    this.active = new Set(state.queues.map(({ index }) => index));
    this.disabled = disabledQueues(state);
    const queues = this.enabledWith(eventfds);
    try {
      await deadline.race(this.calls.settled());
      // A doorbell is not rung before DRIVER_OK (VIRTIO 1.2, 3.1.1); a function that waits itself knows when to look.
      const waits = ({ index }: { index: number }) => this.doorbell(index).takeKick !== undefined;
      const connect = async () => {
        const calls = [...this.active].map((index) => this.calls.route(index, eventfds.get(index)?.call ?? null));
        // Who was given the function's file may have routed it elsewhere.
        calls.push(this.device.fn.interrupts.route(CONFIG_VECTOR, this.configInterrupt.number));
        await deadline.race(Promise.all([...calls, ...this.connectKicks(queues.filter(waits))]));
      };
      await this.mover.configure(state, deadline, connect);
      await deadline.race(Promise.all(this.connectKicks(queues.filter((queue) => !waits(queue)))));
      await this.stir(queues, deadline);
    } catch (error) {
      // The caller's deadline may have passed, but a device that has not come to rest must not be taken for one that has.
      const { address } = this.device.fn;
      const deadline = Deadline.after(CLEAN_UP_TIMEOUT, `reset of ${address}, which did not start`);
      const second = await this.reset(deadline).then(() => undefined, asError);
      if (second instanceof VhostdError && second.code === "resetTimedOut") {
        throw new VhostdError("resetTimedOut", `${asError(error).message}; ${second.message}`, { cause: error });
      }
      throw error;
    }
  }

  /** See StateMover.standBy. @throws VhostdError */
  async standBy(deadline: Deadline): Promise<void> {
    using _change = this.health.change();
    await this.mover.standBy?.(deadline);
  }

  /** See StateMover.prepare. A start does all where the device cannot be prepared. @throws VhostdError; it is reset then */
  async prepare(wanted: DeviceState, deadline: Deadline): Promise<void> {
    using _change = this.health.change();
    await this.mover.prepare?.(this.complete(wanted), deadline);
  }

  /** See StateMover.track. @throws VhostdError notSupported where the device cannot */
  async track(wanted: Tracking | undefined, deadline: Deadline): Promise<string | undefined> {
    if (this.mover.track !== undefined) return await this.mover.track(wanted, deadline);
    if (wanted === undefined) return undefined;
    throw new VhostdError("notSupported", `${this.device.fn.address} cannot mark the pages that it writes`);
  }

  /** See StateMover.onTrackingLost. */
  onTrackingLost(handler: (error: Error) => void): void {
    this.mover.onTrackingLost?.(handler);
  }

  /**
   * From now on the running device uses exactly these of the queues that it was started with. The kicks of the others are
   * disconnected; every doorbell and every call of these is rung once.
   * @param eventfds by queue, borrowed for the call
   * @throws VhostdError where the device does not take it, or does not give back in time what it has taken from a queue
   *   that is disabled; the kicks stay disconnected. Where it does not run any more, it was reset
   */
  async enable(
    queues: ReadonlySet<number>,
    eventfds: ReadonlyMap<number, QueueEventfds>,
    memory: RingMemory,
    deadline: Deadline,
  ): Promise<void> {
    using _change = this.health.change();
    for (const queue of queues) this.checkActive(queue);
    await deadline.race(this.kicks.disconnectAll());
    await this.mover.enable(queues, memory, deadline);
    this.disabled = this.active.difference(queues);
    const enabled = this.enabledWith(eventfds);
    await deadline.race(Promise.all(this.connectKicks(enabled)));
    await this.stir(enabled, deadline);
  }

  /**
   * Disconnects the kicks and freezes the device. The calls, which it has no use for then, are disconnected in the
   * background.
   * @returns the state it stopped in, ring indices included
   * @param note told of each step that is done
   * @throws VhostdError timedOut where the device does not drain; the kicks stay disconnected
   */
  async stop(memory: RingMemory, mode: FreezeMode, deadline: Deadline, note?: StopNote): Promise<DeviceState> {
    using _change = this.health.change();
    const kicksOff = deadline.race(this.kicks.disconnectAll()).then(() => note?.("kicks_off"));
    const [, state] = await both(kicksOff, this.mover.freeze(memory, mode, deadline));
    note?.("freeze");
    this.letCallsGo();
    return state;
  }

  /** The guest hears of no used buffer until it is started again, so that it makes none available any more either. */
  async mute(deadline: Deadline): Promise<void> {
    await deadline.race(Promise.all([...this.active].map((queue) => this.calls.route(queue, null))));
  }

  /** Status 0 and nothing connected. @throws VhostdError resetTimedOut; connectionLost where the function is gone */
  async reset(deadline: Deadline): Promise<void> {
    using _change = this.health.change();
    // A function that cannot be told of the kicks cannot be reset either: that failure is the one to know of.
    await Promise.all([this.mover.reset(deadline), this.kicks.disconnectAll()]);
    this.letCallsGo();
    await deadline.race(this.calls.settled());
  }

  /** The function reaches no memory any more, whatever state it is in. It has to be reset before it works again. */
  async cutOff(deadline: Deadline): Promise<void> {
    await deadline.race(this.device.setBusMaster(false));
  }

  /** Whether there is still somebody at the function's registers. Never rejects. */
  answers(deadline: Deadline): Promise<boolean> {
    return deadline.race(this.device.status()).then(
      () => true,
      () => false,
    );
  }

  /**
   * Another eventfd kicks this queue from now on; null for none. The doorbell is rung once. A queue that is disabled is
   * not kicked.
   */
  async setKick(queue: number, fd: number | null): Promise<void> {
    this.checkActive(queue);
    if (fd === null || this.disabled.has(queue)) return this.kicks.disconnect(queue);
    await this.kicks.connect(queue, fd);
    await this.ring(queue);
  }

  /** Another eventfd is told of used buffers from now on; null for none. It is signalled once. */
  async setCall(queue: number, fd: number | null): Promise<void> {
    this.checkActive(queue);
    await this.calls.route(queue, fd);
    if (fd !== null) signalEventfd(fd);
  }

  /** Plain data and fds (borrowed). */
  snapshot(): FunctionSnapshot {
    const fds = new Map([[CONFIG_INTERRUPT, this.configInterrupt.number]]);
    for (const [queue, fd] of this.kicks.fds) fds.set(`kick.${queue}`, fd);
    const control = this.control?.snapshot();
    if (control !== undefined) fds.set(CONTROL_MEMORY, control.fd);
    const data = {
      layout: this.device.layout,
      features: `0x${this.features.toString(16)}`,
      limits: this.limits,
      mover: moverData(this.mover.snapshot()),
      queues: [...this.active],
      ...(control === undefined ? {} : { control: control.data }),
    };
    return { data, fds };
  }

  /** Lets go of everything of this process without a word to the device. */
  abandon(): void {
    if (this.closed) return;
    this.closed = true;
    this.mover.abandon?.();
    this.health[Symbol.dispose]();
    this.watch[Symbol.dispose]();
    this.kicks[Symbol.dispose]();
    this.configInterrupt[Symbol.dispose]();
    this.control?.[Symbol.dispose]();
  }

  private complete(wanted: DeviceState): DeviceState {
    const { queues, vectors, features, ownFeatures } = this;
    return completeState(wanted, { address: this.device.fn.address, queues, vectors, features, ownFeatures });
  }

  /** Acknowledged whatever the guest negotiated. */
  private get ownFeatures(): bigint {
    const own = ownFeatures(this.features);
    const { control } = this.deviceClass;
    return this.control === undefined || control === undefined
      ? own
      : own | (featureBits(...control.features) & this.features);
  }

  private get controlDevice(): ControlDevice {
    return { address: this.device.fn.address, ringDoorbell: (queue) => this.ring(queue) };
  }

  private enabledWith(eventfds: ReadonlyMap<number, QueueEventfds>): readonly ConnectableQueue[] {
    const enabled = [...this.active.difference(this.disabled)];
    return enabled.map((index) => ({ index, kick: undefined, call: undefined, ...eventfds.get(index) }));
  }

  private connectKicks(queues: readonly ConnectableQueue[]): (Promise<void> | undefined)[] {
    return queues.map(({ index, kick }) => (kick === undefined ? undefined : this.kicks.connect(index, kick)));
  }

  /** Both sides look at these queues once. */
  private async stir(queues: readonly ConnectableQueue[], deadline: Deadline): Promise<void> {
    await deadline.race(Promise.all(queues.map(({ index }) => this.ring(index))));
    for (const { call } of queues) if (call !== undefined) signalEventfd(call);
  }

  /** async, so that a doorbell that cannot be found rejects like one that cannot be rung. */
  private async ring(queue: number): Promise<void> {
    await this.doorbell(queue).ring(queue);
  }

  private doorbell(queue: number): Doorbell {
    const known = this.doorbells.get(queue);
    if (known !== undefined) return known;
    const limits = this.limits[queue];
    if (limits === undefined) throw new VhostdError("invalid", `${this.device.fn.address} has no queue ${queue}`);
    const doorbell = this.device.doorbell(queue, limits.notifyOff);
    this.doorbells.set(queue, doorbell);
    return doorbell;
  }

  private letCallsGo(): void {
    this.calls.letGo(this.active);
    this.active = new Set();
  }

  private checkActive(queue: number): void {
    if (this.active.has(queue)) return;
    throw new VhostdError("invalid", `queue ${queue} of ${this.device.fn.address} is not running`);
  }

  /** A change of the configuration space, or of the device's mind (2.1.2). */
  private async onConfigInterrupt(): Promise<void> {
    if (this.closed) return;
    try {
      drainEventfd(this.configInterrupt.number);
      if (!this.health.asksForReset(await this.device.status())) this.configHandler();
    } catch (error) {
      this.health.report({ gone: false, error: asError(error) });
    }
    // Only now, so that a device that signals without end is answered at the pace of its own registers.
    if (!this.closed) this.watch.rearm();
  }
}
