import { Deadline } from "../base/deadline.ts";
import { asError, VhostdError } from "../base/errors.ts";
import type { Json } from "../base/json.ts";
import { duplicate, type OwnedFd } from "../native/fd.ts";
import { type Watch, watch } from "../native/poller.ts";
import { drainEventfd, eventfd, signalEventfd } from "../native/sys.ts";
import type { Doorbell, FunctionSnapshot, PciFunction } from "../pci/function.ts";
import { parseDataPathRecord } from "./data-path-record.ts";
import type { DeviceState } from "./device-state.ts";
import { FeatureBit, featureBits, Status } from "./features.ts";
import type {
  FreezeMode,
  ManualControl,
  MoverCapabilities,
  MoverFactory,
  MoverHost,
  MoverSnapshot,
  StateMover,
} from "./mover.ts";
import { RegistersMover } from "./movers/registers.ts";
import { describeStatus, ownFeatures, type QueueLimits, VirtioPciDevice } from "./pci-device.ts";
import type { RingMemory } from "./split-ring.ts";

/** The vector of configuration changes; that of queue n is n + 1. */
const CONFIG_VECTOR = 0;
const CONFIG_INTERRUPT = "config-interrupt";
/** Bits that only the vhost-user protocol knows. */
const VHOST_BITS = featureBits(FeatureBit.vhostLogAll, FeatureBit.vhostUserProtocolFeatures);

/** Milliseconds to bring the device to rest after a start that failed. */
const CLEAN_UP_TIMEOUT = 5000;

const registersMover: MoverFactory = (host, snapshot) => new RegistersMover(host, snapshot);

/** The eventfds of one ring, borrowed; undefined where there is none. */
export interface QueueEventfds {
  readonly kick: number | undefined;
  readonly call: number | undefined;
}

/** `gone`: there is no function any more. Otherwise the device works again after a reset. */
export interface DataPathFailure {
  readonly gone: boolean;
  readonly error: Error;
}

/** A front-end's kick that is connected to a doorbell, and our own descriptor of it. */
interface ConnectedKick {
  readonly fd: OwnedFd;
  /** The relay's; undefined where the function itself waits on the kick. */
  readonly relay: Disposable | undefined;
}

/**
 * One VF between a front-end's eventfds and the device: kicks to doorbells, vectors to calls, and the state that the
 * mover brings in and out. The guest's data never comes here.
 */
export class DataPath {
  private readonly mover: StateMover;
  private readonly watch: Watch;
  private readonly kicks = new Map<number, ConnectedKick>();
  private readonly doorbells = new Map<number, Doorbell>();
  /** Queues that are set up: their calls are routed. */
  private active = new Set<number>();
  private configHandler: () => void = () => {};
  private failureHandler: (failure: DataPathFailure) => void = () => {};
  private closed = false;

  private constructor(
    private readonly device: VirtioPciDevice,
    /** All 64 feature bits that the function offers. */
    readonly features: bigint,
    private readonly limits: readonly QueueLimits[],
    private readonly configInterrupt: OwnedFd,
    makeMover: MoverFactory,
    snapshot: MoverSnapshot,
  ) {
    const ringDoorbell: MoverHost["ringDoorbell"] = async (queue) => this.doorbell(queue).ring(queue);
    this.mover = makeMover({ device, features, limits, ringDoorbell }, snapshot);
    this.watch = watch(configInterrupt.number, "in", () => void this.onConfigInterrupt());
    void device.fn.lost.then((error) => this.fail({ gone: true, error }));
  }

  /**
   * Probes a function and resets it.
   * @throws VhostdError probeFailed, resetTimedOut, noVectors
   */
  static async open(fn: PciFunction, deadline: Deadline, makeMover = registersMover): Promise<DataPath> {
    const device = await VirtioPciDevice.probe(fn, deadline);
    await device.reset(deadline);
    const [features, limits] = await deadline.race(Promise.all([device.features(), device.queueLimits()]));
    if (fn.interrupts.count === 0) {
      throw new VhostdError("noVectors", `${fn.address} has no MSI-X vectors`, {
        fix: "provision the function with one vector for each queue and one more",
      });
    }
    using undo = new DisposableStack();
    const interrupt = undo.use(eventfd());
    await deadline.race(fn.interrupts.route(CONFIG_VECTOR, interrupt.number));
    const path = new DataPath(device, features, limits, interrupt, makeMover, { kind: "reset" });
    undo.move();
    return path;
  }

  /**
   * Goes on with a data path as another process left it, without a word to the device. Takes the fds.
   * @throws VhostdError invalid where the record or the fds do not fit
   */
  static revive(
    fn: PciFunction,
    data: Json,
    fds: Map<string, OwnedFd>,
    makeMover: MoverFactory = registersMover,
  ): DataPath {
    using undo = new DisposableStack();
    for (const fd of fds.values()) undo.use(fd);
    const record = parseDataPathRecord(data);
    const interrupt = fds.get(CONFIG_INTERRUPT);
    if (interrupt === undefined) throw new VhostdError("invalid", `the record of ${fn.address} lacks its interrupt`);
    const device = new VirtioPciDevice(fn, record.layout);
    const path = new DataPath(device, BigInt(record.features), record.limits, interrupt, makeMover, record.mover);
    undo.defer(() => path.abandon());
    path.active = new Set(record.queues);
    for (const queue of record.queues) {
      const kick = fds.get(`kick.${queue}`);
      if (kick !== undefined) path.adoptKick(queue, kick);
    }
    if (fds.size !== path.kicks.size + 1) throw new VhostdError("invalid", `the record of ${fn.address} has spare fds`);
    undo.move();
    return path;
  }

  get virtioId(): number {
    return this.device.virtioId;
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

  /** Replaces the earlier handler. */
  onFailure(handler: (failure: DataPathFailure) => void): void {
    this.failureHandler = handler;
  }

  /**
   * Configures the device and lets it run. Every doorbell and every call is rung once at the end: a signal may have
   * been lost before. Vectors are assigned here, whatever `wanted` says.
   * @param eventfds by queue, borrowed for the call
   * @throws VhostdError; the device is reset and nothing is connected then. With resetTimedOut
   *   the device did not come to rest
   */
  async start(wanted: DeviceState, eventfds: ReadonlyMap<number, QueueEventfds>, deadline: Deadline): Promise<void> {
    if (this.running) throw new VhostdError("invalid", `${this.device.fn.address} is running already`);
    const state = this.complete(wanted);
    const queues = state.queues.map(({ index }) => ({ index, ...eventfds.get(index) }));
    this.active = new Set(queues.map(({ index }) => index));
    try {
      const calls = queues.map(({ index, call }) => this.routeCall(index, call ?? null));
      // A doorbell is not rung before DRIVER_OK (VIRTIO 1.2, 3.1.1); a function that waits itself knows when to look.
      const waits = ({ index }: { index: number }) => this.doorbell(index).takeKick !== undefined;
      const connect = (chosen: typeof queues) =>
        chosen.map(({ index, kick }) => (kick === undefined ? undefined : this.connectKick(index, kick)));
      await deadline.race(Promise.all([...calls, ...connect(queues.filter(waits))]));
      await this.mover.configure(state, deadline);
      await deadline.race(Promise.all(connect(queues.filter((queue) => !waits(queue)))));
      // async, so that a doorbell that cannot be found rejects like one that cannot be rung.
      await deadline.race(Promise.all(queues.map(async ({ index }) => this.doorbell(index).ring(index))));
      for (const { call } of queues) if (call !== undefined) signalEventfd(call);
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

  /**
   * Disconnects the kicks, freezes the device, and disconnects the calls.
   * @returns the state it stopped in, ring indices included
   * @throws VhostdError timedOut where the device does not drain; the kicks stay disconnected
   */
  async stop(memory: RingMemory, mode: FreezeMode, deadline: Deadline): Promise<DeviceState> {
    await deadline.race(this.disconnectKicks());
    const state = await this.mover.freeze(memory, mode, deadline);
    await this.disconnectCalls(deadline);
    return state;
  }

  /** The guest hears of no used buffer until it is started again, so that it makes none available any more either. */
  async mute(deadline: Deadline): Promise<void> {
    await deadline.race(Promise.all([...this.active].map((queue) => this.routeCall(queue, null))));
  }

  /** Status 0 and nothing connected. @throws VhostdError resetTimedOut; connectionLost where the function is gone */
  async reset(deadline: Deadline): Promise<void> {
    // A function that cannot be told of the kicks cannot be reset either: that failure is the one to know of.
    await Promise.all([this.mover.reset(deadline), this.disconnectKicks()]);
    await this.disconnectCalls(deadline);
  }

  /** Another eventfd kicks this queue from now on; null for none. The doorbell is rung once. */
  async setKick(queue: number, fd: number | null): Promise<void> {
    this.checkActive(queue);
    if (fd === null) return this.disconnectKick(queue);
    await this.connectKick(queue, fd);
    await this.doorbell(queue).ring(queue);
  }

  /** Another eventfd is told of used buffers from now on; null for none. It is signalled once. */
  async setCall(queue: number, fd: number | null): Promise<void> {
    this.checkActive(queue);
    await this.routeCall(queue, fd);
    if (fd !== null) signalEventfd(fd);
  }

  /** Plain data and fds (borrowed). */
  snapshot(): FunctionSnapshot {
    const fds = new Map([[CONFIG_INTERRUPT, this.configInterrupt.number]]);
    for (const [queue, { fd }] of this.kicks) fds.set(`kick.${queue}`, fd.number);
    const data = {
      layout: this.device.layout,
      features: `0x${this.features.toString(16)}`,
      limits: this.limits,
      mover: moverData(this.mover.snapshot()),
      queues: [...this.active],
    };
    return { data, fds };
  }

  /** Lets go of everything of this process without a word to the device. */
  abandon(): void {
    if (this.closed) return;
    this.closed = true;
    this.watch[Symbol.dispose]();
    for (const queue of [...this.kicks.keys()]) this.forgetKick(queue);
    this.configInterrupt[Symbol.dispose]();
  }

  /** Vectors, status and the feature bits that are the function's own matter. */
  private complete(wanted: DeviceState): DeviceState {
    const last = Math.max(-1, ...wanted.queues.map(({ index }) => index));
    if (last >= this.queues) {
      throw new VhostdError("invalid", `queue ${last} was asked for; ${this.device.fn.address} has ${this.queues}`);
    }
    const needed = last + 2;
    if (needed > this.vectors) {
      throw new VhostdError(
        "noVectors",
        `${last + 1} queues need ${needed} MSI-X vectors; ${this.device.fn.address} has ${this.vectors}`,
        { fix: "provision the function with more vectors, or give the guest fewer queues" },
      );
    }
    return {
      ...wanted,
      features: (wanted.features & this.features & ~VHOST_BITS) | ownFeatures(this.features),
      status: Status.acknowledge | Status.driver | Status.featuresOk | Status.driverOk,
      configVector: CONFIG_VECTOR,
      queues: wanted.queues.map((queue) => ({ ...queue, vector: queue.index + 1 })),
    };
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

  /** Noted before the function is told: a reset that comes meanwhile has it let go again. */
  private async connectKick(queue: number, kick: number): Promise<void> {
    using undo = new DisposableStack();
    const fd = undo.use(duplicate(kick));
    this.adoptKick(queue, fd);
    undo.move();
    await this.doorbell(queue).takeKick?.(fd.number);
  }

  /** Takes the fd, in the place of an earlier one. A function that waits on it itself does so already. */
  private adoptKick(queue: number, fd: OwnedFd): void {
    this.forgetKick(queue);
    const doorbell = this.doorbell(queue);
    const relay = doorbell.takeKick === undefined ? doorbell.connect(fd.number, queue) : undefined;
    this.kicks.set(queue, { fd, relay });
  }

  /** Nothing of this process looks at the kick any more. */
  private forgetKick(queue: number): boolean {
    const kick = this.kicks.get(queue);
    if (kick === undefined) return false;
    this.kicks.delete(queue);
    kick.relay?.[Symbol.dispose]();
    kick.fd[Symbol.dispose]();
    return true;
  }

  private async disconnectKick(queue: number): Promise<void> {
    if (this.forgetKick(queue)) await this.doorbell(queue).takeKick?.(null);
  }

  private async disconnectKicks(): Promise<void> {
    await Promise.all([...this.kicks.keys()].map((queue) => this.disconnectKick(queue)));
  }

  private routeCall(queue: number, call: number | null): Promise<void> {
    return this.device.fn.interrupts.route(queue + 1, call);
  }

  private async disconnectCalls(deadline: Deadline): Promise<void> {
    const queues = [...this.active];
    this.active = new Set();
    await deadline.race(Promise.all(queues.map((queue) => this.routeCall(queue, null))));
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
      const status = await this.device.status();
      if ((status & Status.needsReset) === 0) {
        this.configHandler();
      } else {
        const error = new VhostdError("io", `${this.device.fn.address} asks for a reset: ${describeStatus(status)}`);
        this.fail({ gone: false, error });
      }
    } catch (error) {
      this.fail({ gone: false, error: asError(error) });
    }
    // Only now, so that a device that signals without end is answered at the pace of its own registers.
    if (!this.closed) this.watch.rearm();
  }

  private fail(failure: DataPathFailure): void {
    if (!this.closed) this.failureHandler(failure);
  }
}

/** A snapshot as JSON: what is in it is plain, but not by its type. */
function moverData(snapshot: MoverSnapshot): Json {
  if (snapshot.kind === "reset") return { kind: snapshot.kind };
  const { features, status, configVector, config } = snapshot.state;
  const queues = snapshot.state.queues.map(({ inFlight, ...queue }) =>
    inFlight === undefined ? queue : { ...queue, inFlight: [...inFlight] },
  );
  return { kind: snapshot.kind, state: { features, status, configVector, config, queues } };
}
