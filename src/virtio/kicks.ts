import { VhostdError } from "../base/errors.ts";
import { duplicate, type OwnedFd } from "../native/fd.ts";
import type { Doorbell } from "../pci/function.ts";

/** A front-end's kick that is connected to a doorbell, and our own descriptor of it. */
interface ConnectedKick {
  readonly fd: OwnedFd;
  /** The relay's; undefined where the function itself waits on the kick. */
  readonly relay: Disposable | undefined;
}

/** The kicks of a front-end, connected to the doorbells of a function. */
export class Kicks implements Disposable {
  private readonly connected = new Map<number, ConnectedKick>();
  /** Functions are being told to wait on a kick no more. Rejects as they do. */
  private leaving: Promise<unknown> = Promise.resolve();
  private closed = false;

  /** @param doorbellOf a queue; what it throws, connecting throws */
  constructor(private readonly doorbellOf: (queue: number) => Doorbell) {}

  get size(): number {
    return this.connected.size;
  }

  /** By queue, borrowed. */
  get fds(): ReadonlyMap<number, number> {
    return new Map([...this.connected].map(([queue, { fd }]) => [queue, fd.number]));
  }

  /**
   * In the place of an earlier kick of the queue. Noted before the function is told: a reset that comes meanwhile has it
   * let go again.
   * @param kick borrowed for the call
   * @throws VhostdError cancelled after the end
   */
  async connect(queue: number, kick: number): Promise<void> {
    if (this.closed) throw new VhostdError("cancelled", `queue ${queue} takes no kicks any more`);
    using undo = new DisposableStack();
    const fd = undo.use(duplicate(kick));
    this.adopt(queue, fd);
    undo.move();
    await this.doorbellOf(queue).takeKick?.(fd.number);
  }

  /** Takes the fd, in the place of an earlier one. A function that waits on it itself does so already. */
  adopt(queue: number, fd: OwnedFd): void {
    this.forget(queue);
    const doorbell = this.doorbellOf(queue);
    const relay = doorbell.takeKick === undefined ? doorbell.connect(fd.number, queue) : undefined;
    this.connected.set(queue, { fd, relay });
  }

  /** Not passed on any more when this returns. A function that waits itself is told: see `disconnectAll`. */
  disconnect(queue: number): void {
    if (!this.forget(queue)) return;
    this.leaving = Promise.all([this.leaving, this.doorbellOf(queue).takeKick?.(null)]);
    this.leaving.catch(() => {});
  }

  /** Resolves when no function waits on a kick any more. @throws what those do that were told since the last time */
  async disconnectAll(): Promise<void> {
    for (const queue of [...this.connected.keys()]) this.disconnect(queue);
    const { leaving } = this;
    this.leaving = Promise.resolve();
    await leaving;
  }

  /** Nothing of this process looks at them any more. */
  [Symbol.dispose](): void {
    this.closed = true;
    for (const queue of [...this.connected.keys()]) this.forget(queue);
  }

  private forget(queue: number): boolean {
    const kick = this.connected.get(queue);
    if (kick === undefined) return false;
    this.connected.delete(queue);
    kick.relay?.[Symbol.dispose]();
    kick.fd[Symbol.dispose]();
    return true;
  }
}
