import type { Deadline } from "../base/deadline.ts";
import { SystemError, VhostdError } from "../base/errors.ts";
import { checkFd, checkInteger, checkSize } from "./arguments.ts";
import { addon } from "./load.ts";
import { type Watch, watch } from "./poller.ts";
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
}

/** Where a ring stood when its worker ended. */
export interface RingIndices {
  readonly queue: number;
  readonly lastAvail: number;
  readonly lastUsed: number;
}

export interface RingStats {
  readonly requests: number;
  /** Data moved, bytes. */
  readonly bytes: number;
  readonly errors: number;
}

export type RingParameters = Readonly<Record<string, string | number | bigint | boolean>>;

/** native/ring/ring-napi.cc. Texts are reasons, empty for none; numbers are 0 or -errno. */
interface NativeRingFunction {
  create(backend: string, parameters: RingParameters, queues: number): string;
  doorbell(queue: number): number;
  events(): number;
  map(iova: number, size: number, fd: number, offset: number, writable: boolean): number;
  unmap(iova: number, size: number): number;
  unmapAll(): void;
  check(config: RingConfig): string;
  activate(queue: number, config: RingConfig, features: bigint): string;
  start(features: bigint): string;
  setCall(queue: number, fd: number): boolean;
  configure(parameters: RingParameters): string;
  requestStop(drain: boolean): void;
  tryStop(milliseconds: number): boolean;
  indices(): RingIndices[];
  failure(): string;
  stats(): RingStats[];
  close(): void;
}
const { RingFunction } = addon as unknown as { readonly RingFunction: new () => NativeRingFunction };

/** Milliseconds that a stop may hold up the event loop, and that lie between two attempts. */
const STOP_SLICE = 2;
const STOP_INTERVAL = 5;

/**
 * The rings of one soft function: its view of guest memory, its virtqueues, and a native thread that serves them from
 * `start` to `stop`.
 */
export class RingEngine implements Disposable {
  private readonly native = new RingFunction();
  private readonly events: Watch;
  private closed = false;

  /**
   * @param worker name of the native backend, and its parameters
   * @param onFailure the rings have failed: nothing is served until they are stopped and set up again
   * @throws VhostdError invalid
   */
  constructor(
    worker: { readonly name: string; readonly parameters: RingParameters },
    readonly queues: number,
    onFailure: (reason: string) => void,
  ) {
    checkInteger(queues, 0, 0xffff, "number of queues");
    refuse(this.native.create(worker.name, worker.parameters, queues));
    this.events = watch(this.native.events(), "in", () => {
      drainEventfd(this.native.events());
      this.events.rearm();
      const reason = this.native.failure();
      if (reason !== "") onFailure(reason);
    });
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
   * Part of a memory file becomes reachable. The fd is borrowed for the call.
   * @throws SystemError EEXIST where it overlaps, EINVAL where the file is shorter
   */
  map(iova: number, size: number, fd: number, offset: number, writable: boolean): void {
    checkSize(iova, "IOVA");
    checkSize(size, "size of a DMA range");
    checkSize(offset, "offset in a memory file");
    succeed(this.native.map(iova, size, checkFd(fd), offset, writable), "map guest memory");
  }

  /**
   * Exactly a range that was mapped is not touched any more when this returns. A ring in it fails the function.
   * @throws SystemError ENOENT
   */
  unmap(iova: number, size: number): void {
    checkSize(iova, "IOVA");
    checkSize(size, "size of a DMA range");
    succeed(this.native.unmap(iova, size), "unmap guest memory");
  }

  unmapAll(): void {
    this.native.unmapAll();
  }

  /** Why a ring cannot be used as things are, or undefined. */
  findProblem(config: RingConfig): string | undefined {
    return this.native.check(checkRing(config)) || undefined;
  }

  /**
   * Sets a ring up. It is served from `start` on, or at once while running.
   * @throws VhostdError invalid with the reason
   */
  activate(queue: number, config: RingConfig, features: bigint): void {
    refuse(this.native.activate(this.checkQueue(queue), checkRing(config), features));
  }

  /** Starts serving. @throws VhostdError invalid with the reason */
  start(features: bigint): void {
    refuse(this.native.start(features));
  }

  /** Calls of the queue are signalled on `fd`, which is borrowed for the call; null for nowhere. */
  setCall(queue: number, fd: number | null): void {
    const accepted = this.native.setCall(this.checkQueue(queue), fd === null ? -1 : checkFd(fd));
    if (!accepted) throw new VhostdError("limitExceeded", "no file descriptor is left for a call");
  }

  /** Parameters of the backend, also while it runs. @throws VhostdError invalid with the reason */
  configure(parameters: RingParameters): void {
    refuse(this.native.configure(parameters));
  }

  /**
   * Stops serving; all rings are inactive afterwards and a failure is forgotten.
   * @param requests that were taken: "finish" completes them, "drop" forgets them
   * @returns where the rings stood
   * @throws VhostdError timedOut while the worker is held up by the system; it ends later, ask again
   */
  async stop(requests: "finish" | "drop", deadline: Deadline): Promise<readonly RingIndices[]> {
    this.native.requestStop(requests === "finish");
    await deadline.poll(() => (this.native.tryStop(STOP_SLICE) ? true : undefined), STOP_INTERVAL);
    return this.native.indices();
  }

  /** By queue, since the engine was made. */
  stats(): readonly RingStats[] {
    return this.native.stats();
  }

  /** Stops at once, unmaps everything, closes all fds. */
  [Symbol.dispose](): void {
    if (this.closed) return;
    this.closed = true;
    this.events[Symbol.dispose]();
    this.native.close();
  }

  private checkQueue(queue: number): number {
    return checkInteger(queue, 0, this.queues - 1, "queue");
  }
}

function checkRing(config: RingConfig): RingConfig {
  checkInteger(config.size, 0, 0xffff, "ring size");
  checkInteger(config.lastAvail, 0, 0xffff, "available index");
  checkInteger(config.lastUsed, 0, 0xffff, "used index");
  return config;
}

function refuse(reason: string): void {
  if (reason !== "") throw new VhostdError("invalid", reason);
}

function succeed(result: number, call: string): void {
  if (result < 0) throw new SystemError(call, -result);
}
