import type { Deadline } from "../base/deadline.ts";
import { VhostdError } from "../base/errors.ts";
import type { OwnedFd } from "../native/fd.ts";
import { signalEventfd } from "../native/sys.ts";
import type { Doorbell } from "../pci/function.ts";
import { Calls } from "./calls.ts";
import { Kicks } from "./kicks.ts";
import type { QueueLimits, VirtioPciDevice } from "./pci-device.ts";

/** The eventfds of one ring, borrowed; undefined where there is none. */
export interface QueueEventfds {
  readonly kick: number | undefined;
  readonly call: number | undefined;
}

type Eventfds = ReadonlyMap<number, QueueEventfds>;
type ConnectableQueue = QueueEventfds & { readonly index: number };

/** The queues of a function between a front-end's eventfds and the device: kicks to doorbells, vectors to calls. */
export class Wiring implements Disposable {
  private readonly kicks = new Kicks((queue) => this.doorbell(queue));
  private readonly calls: Calls;
  private readonly doorbells = new Map<number, Doorbell>();
  /** Queues that are set up: their calls are routed. */
  private active = new Set<number>();
  /** Those of them that the device is not to use. */
  private disabled = new Set<number>();

  constructor(
    private readonly device: VirtioPciDevice,
    private readonly limits: readonly QueueLimits[],
  ) {
    this.calls = new Calls(device.fn.interrupts);
  }

  /** Queues that are set up. */
  get queues(): readonly number[] {
    return [...this.active];
  }

  /** Kicks that are connected, by queue, borrowed. */
  get kickFds(): ReadonlyMap<number, number> {
    return this.kicks.fds;
  }

  /** These queues are set up from now on. @param disabled of them those that are not to be used */
  begin(queues: readonly number[], disabled: Iterable<number>): void {
    this.active = new Set(queues);
    this.disabled = new Set(disabled);
  }

  /** Of the queues that are set up exactly these are to be used from now on. */
  enable(queues: ReadonlySet<number>): void {
    this.disabled = this.active.difference(queues);
  }

  /** A kick as an earlier process had connected it. Takes the fd. */
  adopt(queue: number, kick: OwnedFd): void {
    this.kicks.adopt(queue, kick);
  }

  /** What the device has to find when it runs: all calls, and the kicks on which the function itself waits. */
  async connectBefore(eventfds: Eventfds): Promise<void> {
    const waiting = this.enabledWith(eventfds).filter((queue) => this.waits(queue));
    const calls = [...this.active].map((index) => this.calls.route(index, eventfds.get(index)?.call ?? null));
    await Promise.all([...calls, ...this.connect(waiting)]);
  }

  /**
   * The kicks that are rung by us. A doorbell is not rung before DRIVER_OK (VIRTIO 1.2, 3.1.1); a function that waits
   * itself knows when to look.
   */
  async connectAfter(eventfds: Eventfds): Promise<void> {
    await Promise.all(this.connect(this.enabledWith(eventfds).filter((queue) => !this.waits(queue))));
  }

  /** None is connected. */
  async connectAll(eventfds: Eventfds): Promise<void> {
    await Promise.all(this.connect(this.enabledWith(eventfds)));
  }

  /**
   * After a revival. A function that waits on kicks itself is told of all once more: the process before may have died when
   * one was noted, or given up, and the function had not heard of it. Of others those are connected that are not.
   */
  async connectAgain(eventfds: Eventfds): Promise<void> {
    const { fds } = this.kicks;
    const queues = this.enabledWith(eventfds).filter((queue) => this.waits(queue) || !fds.has(queue.index));
    const unused = [...this.active.intersection(this.disabled)].map((queue) => this.doorbell(queue).takeKick?.(null));
    await Promise.all([...this.connect(queues), ...unused]);
  }

  /** Both sides look at the queues in use once. */
  async stir(eventfds: Eventfds, deadline: Deadline): Promise<void> {
    const queues = this.enabledWith(eventfds);
    await deadline.race(Promise.all(queues.map(({ index }) => this.ring(index))));
    for (const { call } of queues) if (call !== undefined) signalEventfd(call);
  }

  /** See DataPath.setKick. */
  async setKick(queue: number, fd: number | null): Promise<void> {
    this.checkActive(queue);
    if (fd === null || this.disabled.has(queue)) return this.kicks.disconnect(queue);
    await this.kicks.connect(queue, fd);
    await this.ring(queue);
  }

  /** See DataPath.setCall. */
  async setCall(queue: number, fd: number | null): Promise<void> {
    this.checkActive(queue);
    await this.calls.route(queue, fd);
    if (fd !== null) signalEventfd(fd);
  }

  /** No call is told of anything. */
  async mute(): Promise<void> {
    await Promise.all([...this.active].map((queue) => this.calls.route(queue, null)));
  }

  /** Resolves when no kick reaches the function any more. */
  disconnectKicks(): Promise<void> {
    return this.kicks.disconnectAll();
  }

  /** No queue is set up any more. Its calls are let go in the background: see `settled`. */
  letCallsGo(): void {
    this.calls.letGo(this.active);
    this.active = new Set();
  }

  /** Resolves when all calls that were let go are gone. @throws what the function has said to it since the last time */
  settled(): Promise<void> {
    return this.calls.settled();
  }

  /** async, so that a doorbell that cannot be found rejects like one that cannot be rung. */
  async ring(queue: number): Promise<void> {
    await this.doorbell(queue).ring(queue);
  }

  /** @throws VhostdError invalid */
  doorbell(queue: number): Doorbell {
    const known = this.doorbells.get(queue);
    if (known !== undefined) return known;
    const limits = this.limits[queue];
    if (limits === undefined) throw new VhostdError("invalid", `${this.device.fn.address} has no queue ${queue}`);
    const doorbell = this.device.doorbell(queue, limits.notifyOff);
    this.doorbells.set(queue, doorbell);
    return doorbell;
  }

  /** @throws VhostdError invalid where the queue is not set up */
  checkActive(queue: number): void {
    if (this.active.has(queue)) return;
    throw new VhostdError("invalid", `queue ${queue} of ${this.device.fn.address} is not running`);
  }

  /** Nothing of this process looks at the kicks any more. */
  [Symbol.dispose](): void {
    this.kicks[Symbol.dispose]();
  }

  private enabledWith(eventfds: Eventfds): readonly ConnectableQueue[] {
    const enabled = [...this.active.difference(this.disabled)];
    return enabled.map((index) => ({ index, kick: undefined, call: undefined, ...eventfds.get(index) }));
  }

  private waits({ index }: ConnectableQueue): boolean {
    return this.doorbell(index).takeKick !== undefined;
  }

  private connect(queues: readonly ConnectableQueue[]): (Promise<void> | undefined)[] {
    return queues.map(({ index, kick }) => (kick === undefined ? undefined : this.kicks.connect(index, kick)));
  }
}
