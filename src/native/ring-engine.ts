import { Deadline } from "../base/deadline.ts";
import { SystemError, VhostdError } from "../base/errors.ts";
import { OperationQueue } from "../base/operation-queue.ts";
import { checkFd, checkInteger, checkSize } from "./arguments.ts";
import { duplicate, type OwnedFd } from "./fd.ts";
import { addon } from "./load.ts";
import { type Watch, watch } from "./poller.ts";
import { type NativeRingLog, RingLog } from "./ring-log.ts";
import { drainEventfd, signalEventfd } from "./sys.ts";

/** A split virtqueue as a driver has set it up. Addresses are IOVAs as the driver wrote them: any 64 bits. */
export interface RingConfig {
  /** Entries. */
  readonly size: number;
  readonly desc: bigint;
  readonly driver: bigint;
  readonly device: bigint;
  /** Where both indices begin, mod 2^16. */
  readonly lastAvail: number;
  readonly lastUsed: number;
  /**
   * Heads of chains that the device has taken before `lastAvail` and not given back, in the order they were taken; none
   * unless said. They are read again from the descriptor table and served at `start`.
   */
  readonly inFlight?: readonly number[];
}

/** Where a ring stood when its worker ended. */
export interface RingIndices {
  readonly queue: number;
  readonly lastAvail: number;
  readonly lastUsed: number;
}

/** Where an active ring stands: what a device needs to go on with it. */
export interface RingState extends RingIndices {
  /** Heads of chains that were taken and not given back, in the order they were taken. */
  readonly inFlight: readonly number[];
}

/** A chain that the backend "forward" hands to JavaScript. */
export interface ForwardedRequest {
  /** For `answer`; never used twice. */
  readonly id: number;
  readonly queue: number;
  /** A copy of its device-readable buffers. */
  readonly readable: Uint8Array;
  /** Room in its device-writable buffers, bytes. */
  readonly writable: number;
}

/** Counters of one queue. */
export interface RingStats {
  /** Chains taken. */
  readonly received: number;
  /** Chains given back. */
  readonly completed: number;
  /** Of these, malformed ones and those whose request failed. */
  readonly bad: number;
  /** Data moved, without headers and status bytes. */
  readonly bytes: number;
}

export type RingParameters = Readonly<Record<string, string | number | bigint | boolean>>;

/** native/ring/ring-napi.cc. Texts are reasons, empty for none; numbers are 0 or -errno. */
interface NativeRingFunction extends NativeRingLog {
  create(backend: string, parameters: RingParameters, queues: number): string;
  doorbell(queue: number): number;
  events(): number;
  tryEnter(milliseconds: number): boolean;
  leave(): void;
  withdraw(): void;
  map(iova: number, size: number, fd: number, offset: number, writable: boolean): number;
  unmap(iova: number, size: number): number;
  unmapAll(): void;
  unmapping(): boolean;
  activate(queue: number, config: RingConfig, features: bigint): string;
  start(features: bigint): string;
  setCall(queue: number, fd: number): boolean;
  takeCall(queue: number, fd: number): void;
  setKick(queue: number, fd: number): number;
  quiesce(): void;
  passCalls(): boolean;
  unquiesce(): void;
  inFlight(): number;
  rings(): RingState[];
  takeRequests(): ForwardedRequest[];
  answer(id: number, bytes: Uint8Array): void;
  configure(parameters: RingParameters): string;
  requestStop(how: "finish" | "drop" | "park"): void;
  tryStop(milliseconds: number): boolean;
  tryPark(milliseconds: number): boolean;
  indices(): RingIndices[];
  failure(): string;
  stats(): RingStats[];
  carrier(): boolean;
  info(): Record<string, number>;
  close(): void;
}
const { RingFunction } = addon as unknown as {
  readonly RingFunction: { new (): NativeRingFunction; ending(): number };
};

/** Where the calls of all queues will go. Holds the descriptors until then. */
export interface PreparedCalls extends Disposable {
  /** They go there from now on. Cannot fail; once. */
  commit(): void;
}

/** Limits of open files (of this process or the system), and of what an epoll waits for. */
const ENFILE = 23;
const EMFILE = 24;
const ENOSPC = 28;

/** Milliseconds that the world outside may be out of reach before it is said: the other side may just go on elsewhere. */
const CARRIER_PATIENCE = 250;
/** Milliseconds that the first attempt to have the worker give way or end may hold up the event loop; others none. */
const FIRST_ATTEMPT = 1;
/** Milliseconds between two attempts. */
const INTERVAL = 1;
/** Milliseconds for the worker to give way: one piece of I/O. */
const TURN_TIMEOUT = 30_000;
/** Milliseconds for it to be quiesced: who asks for that waits with others behind, and can ask again. */
const QUIESCE_TIMEOUT = 5000;

/**
 * The rings of one soft function: its view of guest memory, its virtqueues, and a native thread that serves them from
 * `start` to `stop`. What changes the things that the thread uses waits for its piece of I/O, never on the event loop;
 * such changes are made in the order they were asked for.
 *
 * The worker of network devices: pair k is receive queue 2k and transmit queue 2k + 1, then comes the control queue
 * (VIRTIO 1.2, 5.1.2), which the worker serves itself: it knows the number of pairs in use and promiscuous mode. A
 * receive chain is taken only when there is a frame for it, so none is ever in flight. Its parameters:
 *
 * | name | |
 * |---|---|
 * | backend | "tap", "wire" or "echo"; with tap, wire: the name of the interface or the wire |
 * | pairs | queue pairs of the device |
 * | mac | text, or a number whose lowest byte is the first |
 * | mtu | of the device, where the driver knows of it; 0 for none |
 * | link | false: no frame passes. true brings back an interface that is there again |
 * | promiscuous | frames to others pass, too. Without CTRL_RX all pass anyway |
 * | pairsInUse | receiving goes to that many pairs, 1 unless said; 0: to those both of whose queues are active |
 *
 * The driver's commands change `promiscuous` and `pairsInUse`, which `info` shows. Stopping does not: whoever resets the
 * device sets both anew, `pairsInUse` to 1, and to 0 where it goes on with the state of another, which does not tell.
 */
export class RingEngine implements Disposable {
  /** Where it marks the pages that it writes. */
  readonly log: RingLog;
  private readonly handle = new RingFunction();
  private readonly events: Watch;
  private readonly turns = new OperationQueue();
  /** As `onCarrier` was told, and when it is told that it is lost. */
  private reaches: boolean;
  private losing: Timer | undefined;
  private closed = false;

  /**
   * @param worker name of the native backend, and its parameters
   * @param onFailure the rings have failed: nothing is served until they are stopped and set up again
   * @param onRequests with the backend "forward": `takeRequests` may have something
   * @param onCarrier the backend reaches the world outside now, or has not for a while
   * @throws VhostdError invalid
   */
  constructor(
    worker: { readonly name: string; readonly parameters: RingParameters },
    readonly queues: number,
    onFailure: (reason: string) => void,
    onRequests?: () => void,
    private readonly onCarrier?: (up: boolean) => void,
  ) {
    checkInteger(queues, 0, 0xffff, "number of queues");
    refuse(this.native.create(worker.name, worker.parameters, queues));
    const closed = () => this.closed;
    this.log = new RingLog({
      get closed() {
        return closed();
      },
      native: () => this.native,
      turn: (operation, deadline) => this.turn(operation, deadline),
    });
    this.reaches = this.native.carrier();
    this.events = watch(this.native.events(), "in", () => {
      drainEventfd(this.native.events());
      this.events.rearm();
      const reason = this.native.failure();
      if (reason !== "") onFailure(reason);
      if (!this.closed) onRequests?.();
      if (!this.closed) this.checkCarrier();
    });
  }

  /** How many engines of this process were disposed of and have not ended: their fds are still open. */
  static ending(): number {
    return RingFunction.ending();
  }

  /** The queue's notification: an eventfd of this engine, borrowed. */
  doorbell(queue: number): number {
    return this.native.doorbell(this.checkQueue(queue));
  }

  /** A notification of the queue by this process. */
  notify(queue: number): void {
    signalEventfd(this.doorbell(queue));
  }

  /**
   * Part of a memory file becomes reachable. The fd is borrowed until the promise settles.
   * @throws SystemError EEXIST where it overlaps, EINVAL where the file is shorter; VhostdError timedOut
   */
  async map(iova: number, size: number, fd: number, offset: number, writable: boolean): Promise<void> {
    checkSize(iova, "IOVA");
    checkSize(size, "size of a DMA range");
    checkSize(offset, "offset in a memory file");
    checkFd(fd);
    await this.turn(() => succeed(this.native.map(iova, size, fd, offset, writable), "map guest memory"));
  }

  /**
   * Exactly a range that was mapped is not touched any more when this resolves, and its pages are given back. A ring
   * in it fails the function.
   * @throws SystemError ENOENT; VhostdError timedOut
   */
  async unmap(iova: number, size: number): Promise<void> {
    checkSize(iova, "IOVA");
    checkSize(size, "size of a DMA range");
    await this.turn(() => succeed(this.native.unmap(iova, size), "unmap guest memory"));
    await this.unmapped();
  }

  /** @throws VhostdError timedOut */
  async unmapAll(): Promise<void> {
    await this.turn(() => this.native.unmapAll());
    await this.unmapped();
  }

  /**
   * Sets a ring up that is not active. It is served from `start` on, or at once while running.
   * @throws VhostdError invalid with the reason, timedOut
   */
  async activate(queue: number, config: RingConfig, features: bigint): Promise<void> {
    this.checkQueue(queue);
    checkRing(config);
    const inFlight = config.inFlight ?? [];
    await this.turn(() => refuse(this.native.activate(queue, { ...config, inFlight }, features)));
  }

  /** Starts serving, or goes on after `park`. @throws VhostdError invalid with the reason */
  start(features: bigint): void {
    refuse(this.native.start(features));
  }

  /**
   * Calls of the queue are signalled on `fd`, which is borrowed for the call; null for nowhere. One that is under way
   * may still go to the former: where the queue is in use, the new one is to be signalled once.
   */
  setCall(queue: number, fd: number | null): void {
    const accepted = this.native.setCall(this.checkQueue(queue), fd === null ? -1 : checkFd(fd));
    if (!accepted) throw new VhostdError("limitExceeded", "no file descriptor is left for a call");
  }

  /**
   * `setCall` of all queues, by index, in two steps: what can fail is done first. The fds are borrowed for the call.
   * @throws VhostdError limitExceeded where no file descriptor is left
   */
  prepareCalls(fds: readonly (number | null)[]): PreparedCalls {
    checkInteger(fds.length, this.queues, this.queues, "number of calls");
    using undo = new DisposableStack();
    const calls = fds.map((fd) => (fd === null ? undefined : undo.use(duplicateCall(fd))));
    const held = undo.move();
    return {
      commit: () => {
        for (const [queue, call] of calls.entries()) this.native.takeCall(queue, call?.release() ?? -1);
      },
      [Symbol.dispose]: () => held.dispose(),
    };
  }

  /**
   * Signals of an eventfd notify the queue too, also one that waits in it already; null: no longer. It replaces an
   * earlier one and stays until it is replaced. The fd is borrowed for the call; the eventfd is never read or written.
   * @throws VhostdError limitExceeded where no file descriptor is left; SystemError EPERM for what cannot be waited for
   */
  setKick(queue: number, fd: number | null): void {
    const result = this.native.setKick(this.checkQueue(queue), fd === null ? -1 : checkFd(fd));
    if ([ENFILE, EMFILE, ENOSPC].includes(-result)) {
      throw new VhostdError("limitExceeded", "no file descriptor is left for a kick");
    }
    succeed(result, "wait for a kick");
  }

  /**
   * When this resolves the worker takes no further chain, over `park`, `stop` and `start`, until `unquiesce`. What it
   * has taken goes on and completes, also where nobody reads its calls.
   * @throws VhostdError timedOut while the worker is held up by the system; it is not quiesced then
   */
  async quiesce(deadline = turnDeadline(QUIESCE_TIMEOUT)): Promise<void> {
    let wanted = true;
    const quiesced = this.turn(() => {
      if (wanted) this.native.quiesce();
    }, deadline);
    try {
      await deadline.race(quiesced);
      await deadline.poll(() => this.native.passCalls() || undefined, INTERVAL);
    } catch (error) {
      wanted = false;
      if (!this.closed) this.unquiesce();
      throw error;
    }
  }

  /** The worker takes chains again; those that were made available meanwhile are seen, kicked or not. */
  unquiesce(): void {
    this.native.unquiesce();
  }

  /** Chains that were taken, of all queues, and that the driver has not been shown as used. */
  inFlight(): number {
    return this.native.inFlight();
  }

  /**
   * The active rings. They stand still while parked, and while quiesced with nothing in flight.
   * @throws VhostdError busy while the worker is in a piece of I/O
   */
  rings(): readonly RingState[] {
    if (!this.native.tryEnter(FIRST_ATTEMPT)) {
      this.native.withdraw();
      throw new VhostdError("busy", "the ring worker is in a piece of I/O: park it first");
    }
    try {
      return this.native.rings();
    } finally {
      this.native.leave();
    }
  }

  /** Backend "forward": the chains that were handed over since the last call. They live until answered or stopped. */
  takeRequests(): readonly ForwardedRequest[] {
    return this.native.takeRequests();
  }

  /**
   * Copies `bytes`, as far as there is room, to the start of the request's writable buffers and gives the chain back
   * with their number. Never waits. An unknown id is ignored: the ring was stopped meanwhile.
   */
  answer(id: number, bytes: Uint8Array): void {
    this.native.answer(checkSize(id, "id of a request"), bytes);
  }

  /** Parameters of the backend, also while it runs. @throws VhostdError invalid with the reason, timedOut */
  async configure(parameters: RingParameters): Promise<void> {
    await this.turn(() => refuse(this.native.configure(parameters)));
  }

  /**
   * Stops serving until the next `start`: rings and the requests that were taken stay.
   * @throws VhostdError timedOut while the worker is held up by the system; it ends later
   */
  async park(deadline: Deadline): Promise<void> {
    this.native.requestStop("park");
    await this.poll((milliseconds) => this.native.tryPark(milliseconds), deadline);
  }

  /**
   * Stops serving; all rings are inactive afterwards and a failure is forgotten.
   * @param requests that were taken: "finish" completes them, "drop" forgets them. While parked, and where JavaScript
   * has not answered, they are forgotten
   * @returns where the rings stood
   * @throws VhostdError timedOut while the worker is held up by the system; it ends later, ask again
   */
  async stop(requests: "finish" | "drop", deadline: Deadline): Promise<readonly RingIndices[]> {
    this.native.requestStop(requests);
    await this.poll((milliseconds) => this.native.tryStop(milliseconds), deadline);
    return this.native.indices();
  }

  /** By queue, since the engine was made. */
  stats(): readonly RingStats[] {
    return this.native.stats();
  }

  /** Whether the backend reaches the world outside, as `onCarrier` was told last. */
  carrier(): boolean {
    return this.reaches;
  }

  /** What the backend knows of itself, by name: what its driver has set by commands, what it has dropped. */
  info(): Readonly<Record<string, number>> {
    return this.native.info();
  }

  /** Stops at once, unmaps everything, closes all fds; behind the scenes where the worker is held up by the system. */
  [Symbol.dispose](): void {
    if (this.closed) return;
    this.closed = true;
    clearTimeout(this.losing);
    this.events[Symbol.dispose]();
    this.handle.close();
  }

  private checkCarrier(): void {
    const up = this.native.carrier();
    if (up) {
      clearTimeout(this.losing);
      this.losing = undefined;
      this.setCarrier(true);
    } else if (this.reaches && this.losing === undefined) {
      this.losing = setTimeout(() => {
        this.losing = undefined;
        this.setCarrier(this.native.carrier());
      }, CARRIER_PATIENCE);
      this.losing.unref();
    }
  }

  private setCarrier(up: boolean): void {
    if (this.reaches === up) return;
    this.reaches = up;
    this.onCarrier?.(up);
  }

  /** Whoever waited while the engine was closed finds nothing. @throws VhostdError cancelled */
  private get native(): NativeRingFunction {
    if (this.closed) throw new VhostdError("cancelled", "the function is closed");
    return this.handle;
  }

  /** Runs `operation` while the worker is between two pieces of work. */
  private turn(operation: () => void, given?: Deadline): Promise<void> {
    return this.turns.run(async () => {
      const deadline = given ?? turnDeadline(TURN_TIMEOUT);
      try {
        await this.poll((milliseconds) => this.attempt(operation, milliseconds), deadline);
      } finally {
        if (!this.closed) this.native.withdraw();
      }
    });
  }

  private attempt(operation: () => void, milliseconds: number): boolean {
    if (!this.native.tryEnter(milliseconds)) return false;
    try {
      operation();
      return true;
    } finally {
      this.native.leave();
    }
  }

  /** What was unmapped is gone. However long that takes: a file's pages are many, but not endless. */
  private async unmapped(): Promise<void> {
    while (!this.closed && this.native.unmapping()) await Bun.sleep(INTERVAL);
  }

  private async poll(attempt: (milliseconds: number) => boolean, deadline: Deadline): Promise<void> {
    let milliseconds = FIRST_ATTEMPT;
    await deadline.poll(() => {
      const done = attempt(milliseconds);
      milliseconds = 0;
      return done || undefined;
    }, INTERVAL);
  }

  private checkQueue(queue: number): number {
    return checkInteger(queue, 0, this.queues - 1, "queue");
  }
}

function turnDeadline(milliseconds: number): Deadline {
  return Deadline.after(milliseconds, "the ring worker's piece of I/O");
}

/** @throws VhostdError limitExceeded */
function duplicateCall(fd: number): OwnedFd {
  try {
    return duplicate(fd);
  } catch (cause) {
    throw new VhostdError("limitExceeded", "no file descriptor is left for a call", { cause });
  }
}

function checkRing(config: RingConfig): RingConfig {
  checkInteger(config.size, 0, 0xffff, "ring size");
  checkInteger(config.lastAvail, 0, 0xffff, "available index");
  checkInteger(config.lastUsed, 0, 0xffff, "used index");
  for (const head of config.inFlight ?? []) checkInteger(head, 0, 0xffff, "head in flight");
  return config;
}

function refuse(reason: string): void {
  if (reason !== "") throw new VhostdError("invalid", reason);
}

function succeed(result: number, call: string): void {
  if (result < 0) throw new SystemError(call, -result);
}
