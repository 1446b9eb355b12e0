import { both } from "../base/both.ts";
import { Deadline } from "../base/deadline.ts";
import { asError, VhostdError } from "../base/errors.ts";
import type { Json } from "../base/json.ts";
import type { OwnedFd } from "../native/fd.ts";
import { eventfd } from "../native/sys.ts";
import type { DmaDomain } from "../pci/dma-domain.ts";
import type { Doorbell, FunctionSnapshot, PciFunction } from "../pci/function.ts";
import type { ConfigValues, DeviceClass } from "../plugin.ts";
import { CONFIG_VECTOR, completeState } from "./complete-state.ts";
import { ConfigInterrupt } from "./config-interrupt.ts";
import { type ControlDevice, ControlQueue } from "./control-queue.ts";
import { moverData, parseDataPathRecord } from "./data-path-record.ts";
import { type DeviceState, disabledQueues } from "./device-state.ts";
import { decodeDeviceState, isSameSetUp } from "./device-state-codec.ts";
import { type DeviceFailure, DeviceWatch } from "./device-watch.ts";
import type { Tracking } from "./dirty-log.ts";
import { featureBits } from "./features.ts";
import type {
  FreezeMode,
  ManualControl,
  MoverCapabilities,
  MoverFactory,
  MoverHost,
  MoverSnapshot,
  StateMover,
  StopNote,
  TakenUp,
  TakeUp,
} from "./mover.ts";
import { RegistersMover } from "./movers/registers.ts";
import { ownFeatures, type QueueLimits, VirtioPciDevice } from "./pci-device.ts";
import type { RingMemory } from "./split-ring.ts";
import { type QueueEventfds, Wiring } from "./wiring.ts";

const CONFIG_INTERRUPT = "config-interrupt";
const CONTROL_MEMORY = "control";

/** Milliseconds to bring the device to rest after a start that failed. */
const CLEAN_UP_TIMEOUT = 5000;

const registersMover: MoverFactory = (host, snapshot) => new RegistersMover(host, snapshot);

/** The class of a device by its virtio device id. @throws VhostdError probeFailed where nothing serves it */
export type ClassLookup = (virtioId: number) => DeviceClass;

/**
 * One VF between a front-end's eventfds and the device: kicks to doorbells, vectors to calls, and the state that the
 * mover brings in and out. The guest's data never comes here.
 */
export class DataPath {
  private readonly mover: StateMover;
  private readonly configInterrupt: ConfigInterrupt;
  private readonly health: DeviceWatch;
  private readonly wiring: Wiring;
  /** The function's own. */
  private control: ControlQueue | undefined;
  private configHandler: () => void = () => {};
  private noticeHandler: (text: string) => void = () => {};
  private closed = false;
  /** It was taken up running, and nobody has asked anything of it since: who let it run may do so again. */
  private mayStartAgain = false;

  private constructor(
    private readonly device: VirtioPciDevice,
    /** All 64 feature bits that the function offers. */
    readonly features: bigint,
    private readonly limits: readonly QueueLimits[],
    readonly deviceClass: DeviceClass,
    interrupt: OwnedFd,
    makeMover: MoverFactory,
    snapshot: MoverSnapshot,
  ) {
    this.wiring = new Wiring(device, limits);
    const failed = (error: Error) => this.health.report({ gone: false, error });
    const host: MoverHost = {
      device,
      features,
      limits,
      deviceClass,
      control: () => this.control,
      ringDoorbell: (queue) => this.wiring.ring(queue),
      log: (text) => this.noticeHandler(text),
      failed,
    };
    this.mover = makeMover(host, snapshot);
    this.health = new DeviceWatch(device, () => this.running);
    this.configInterrupt = new ConfigInterrupt(interrupt, () => this.onConfigInterrupt(), failed);
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
    undo.defer(() => path.abandon());
    path.configInterrupt.listen();
    await path.mover.prove?.(deadline);
    undo.move();
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
    path.wiring.begin(record.queues, mover.kind === "reset" ? [] : disabledQueues(mover.state));
    if (record.control !== undefined) {
      const memory = fds.get(CONTROL_MEMORY);
      if (memory === undefined) {
        throw new VhostdError("invalid", `the record of ${fn.address} lacks the memory of its control queue`);
      }
      path.control = ControlQueue.revive(path.controlDevice, record.control, memory);
    }
    for (const queue of record.queues) {
      const kick = fds.get(`kick.${queue}`);
      if (kick !== undefined) path.wiring.adopt(queue, kick);
    }
    const known = path.wiring.kickFds.size + (path.control === undefined ? 1 : 2);
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
    const { page } = this.wiring.doorbell(queue);
    return page !== undefined && this.device.ownsDoorbellPage(queue, this.limits, page.size);
  }

  /** The doorbell of a queue, to be given away; undefined where it cannot be. */
  shareDoorbell(queue: number): ReturnType<Doorbell["share"]> {
    return this.canShareDoorbell(queue) ? this.wiring.doorbell(queue).share() : undefined;
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
   * Configures the device and lets it run; one that was taken up running with the same rings just goes on. Every doorbell
   * and every call is rung once at the end, unless its queue is disabled: a signal may have been lost before. Vectors are
   * assigned here, whatever `wanted` says.
   * @param eventfds by queue, borrowed for the call
   * @param note writes the record of this data path; it has resolved before the device may run
   * @throws VhostdError; the device is reset and nothing is connected then. With resetTimedOut
   *   the device did not come to rest
   */
  async start(
    wanted: DeviceState,
    eventfds: ReadonlyMap<number, QueueEventfds>,
    deadline: Deadline,
    note?: () => Promise<void>,
  ): Promise<void> {
    using _change = this.health.change();
    const { address } = this.device.fn;
    if (this.running && !this.mayStartAgain) throw new VhostdError("invalid", `${address} is running already`);
    const state = this.complete(wanted);
    const runs = this.runsWith(state);
    this.mayStartAgain = false;
    if (this.running && !runs) await this.reset(deadline);
    this.wiring.begin(
      state.queues.map(({ index }) => index),
      disabledQueues(state),
    );
    try {
      await deadline.race(this.wiring.settled());
      const connect = () => this.connectBefore(eventfds, deadline);
      if (runs) await connect();
      else await this.mover.configure(state, deadline, note === undefined ? { connect } : { connect, note });
      await deadline.race(this.wiring.connectAfter(eventfds));
      await this.wiring.stir(eventfds, deadline);
    } catch (error) {
      // The caller's deadline may have passed, but a device that has not come to rest must not be taken for one that has.
      const deadline = Deadline.after(CLEAN_UP_TIMEOUT, `reset of ${address}, which did not start`);
      const second = await this.reset(deadline).then(() => undefined, asError);
      if (second instanceof VhostdError && second.code === "resetTimedOut") {
        throw new VhostdError("resetTimedOut", `${asError(error).message}; ${second.message}`, { cause: error });
      }
      throw error;
    }
  }

  /**
   * After a revival, once, before anything else is asked: see StateMover.takeUp. Where the device runs then, the kicks that
   * are not connected are, and every doorbell and every call is rung once. Where it does not (see `running`), nothing is
   * connected. Configuration changes that nobody was told of are told of from now on.
   * @param eventfds by queue, borrowed for the call
   * @throws VhostdError; resetTimedOut where the device has to be reset and does not come to rest
   */
  async takeUp(
    eventfds: ReadonlyMap<number, QueueEventfds>,
    deadline: Deadline,
    how: Pick<TakeUp, "held">,
  ): Promise<TakenUp> {
    using _change = this.health.change();
    this.configInterrupt.listen();
    const { kind } = this.mover.snapshot();
    const connect = () => this.connectBefore(eventfds, deadline);
    const taken = await this.mover.takeUp(deadline, { ...how, connect });
    if (kind === "reset" || kind === "frozen") return taken;
    if (this.running) {
      this.mayStartAgain = true;
      await deadline.race(this.wiring.connectAgain(eventfds));
      await this.wiring.stir(eventfds, deadline);
    } else {
      await deadline.race(this.wiring.disconnectKicks());
      this.wiring.letCallsGo();
    }
    return taken;
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
    for (const queue of queues) this.wiring.checkActive(queue);
    this.mayStartAgain = false;
    await deadline.race(this.wiring.disconnectKicks());
    await this.mover.enable(queues, memory, deadline);
    this.wiring.enable(queues);
    await deadline.race(this.wiring.connectAll(eventfds));
    await this.wiring.stir(eventfds, deadline);
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
    this.mayStartAgain = false;
    const kicksOff = deadline.race(this.wiring.disconnectKicks()).then(() => note?.("kicks_off"));
    const [, state] = await both(kicksOff, this.mover.freeze(memory, mode, deadline));
    note?.("freeze");
    this.wiring.letCallsGo();
    return state;
  }

  /** The guest hears of no used buffer until it is started again, so that it makes none available any more either. */
  async mute(deadline: Deadline): Promise<void> {
    await deadline.race(this.wiring.mute());
  }

  /** Status 0 and nothing connected. @throws VhostdError resetTimedOut; connectionLost where the function is gone */
  async reset(deadline: Deadline): Promise<void> {
    using _change = this.health.change();
    this.mayStartAgain = false;
    // A function that cannot be told of the kicks cannot be reset either: that failure is the one to know of.
    await Promise.all([this.mover.reset(deadline), this.wiring.disconnectKicks()]);
    this.wiring.letCallsGo();
    await deadline.race(this.wiring.settled());
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
  setKick(queue: number, fd: number | null): Promise<void> {
    return this.wiring.setKick(queue, fd);
  }

  /** Another eventfd is told of used buffers from now on; null for none. It is signalled once. */
  setCall(queue: number, fd: number | null): Promise<void> {
    return this.wiring.setCall(queue, fd);
  }

  /** Plain data and fds (borrowed). */
  snapshot(): FunctionSnapshot {
    const fds = new Map([[CONFIG_INTERRUPT, this.configInterrupt.fd]]);
    for (const [queue, fd] of this.wiring.kickFds) fds.set(`kick.${queue}`, fd);
    const control = this.control?.snapshot();
    if (control !== undefined) fds.set(CONTROL_MEMORY, control.fd);
    const data = {
      layout: this.device.layout,
      features: `0x${this.features.toString(16)}`,
      limits: this.limits,
      mover: moverData(this.mover.snapshot()),
      queues: this.wiring.queues,
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
    this.wiring[Symbol.dispose]();
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
    return { address: this.device.fn.address, ringDoorbell: (queue) => this.wiring.ring(queue) };
  }

  private async connectBefore(eventfds: ReadonlyMap<number, QueueEventfds>, deadline: Deadline): Promise<void> {
    const calls = this.wiring.connectBefore(eventfds);
    // Who was given the function's file may have routed it elsewhere.
    const config = this.device.fn.interrupts.route(CONFIG_VECTOR, this.configInterrupt.fd);
    await deadline.race(Promise.all([calls, config]));
  }

  /** It runs, and was started with these rings: where they are now is its own matter, as is the configuration space. */
  private runsWith(state: DeviceState): boolean {
    const snapshot = this.mover.snapshot();
    return snapshot.kind === "running" && isSameSetUp(decodeDeviceState(snapshot.state), state);
  }

  private async onConfigInterrupt(): Promise<void> {
    const status = await this.device.status();
    if (!this.closed && !this.health.asksForReset(status)) this.configHandler();
  }
}
