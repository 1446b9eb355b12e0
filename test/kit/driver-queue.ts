import { VhostdError } from "../../src/base/errors.ts";
import type { OwnedFd } from "../../src/native/fd.ts";
import { watch } from "../../src/native/poller.ts";
import { drainEventfd, eventfd } from "../../src/native/sys.ts";
import type { Completed, DriverRing, RawBuffer, Submitted } from "./driver-ring.ts";

/**
 * A ring with its call: requests as promises. The owner gives `call` to the device and says how the doorbell is rung.
 */
export class DriverQueue implements Disposable {
  /** The device signals this eventfd. */
  readonly call: OwnedFd = eventfd();
  private readonly watch = watch(this.call.number, "in", () => this.onCall());
  private readonly waiting = new Map<number, (completed: Completed) => void>();
  private readonly rejections = new Set<(error: Error) => void>();
  private ended = false;
  /** Signals of the call eventfd seen. */
  calls = 0;

  constructor(
    readonly ring: DriverRing,
    private readonly ringDoorbell: () => void,
  ) {}

  /**
   * One chain, from submission to completion.
   * @throws RangeError where the ring is full; VhostdError cancelled where the queue is disposed of first
   */
  request(readable: readonly Uint8Array[], writable: readonly number[]): Promise<Completed> {
    return this.await(this.ring.submit(readable, writable));
  }

  /** The same for a chain that is built by hand. */
  requestRaw(buffers: readonly RawBuffer[]): Promise<Completed> {
    return this.await(this.ring.submitRaw(buffers));
  }

  /** Looks for completions without a call. */
  collect(): void {
    for (const completed of this.ring.completions()) {
      const done = this.waiting.get(completed.head);
      this.waiting.delete(completed.head);
      done?.(completed);
    }
  }

  [Symbol.dispose](): void {
    if (this.ended) return;
    this.ended = true;
    this.watch[Symbol.dispose]();
    this.call[Symbol.dispose]();
    for (const reject of this.rejections) reject(new VhostdError("cancelled", "the queue was disposed of"));
  }

  private await({ head, notify }: Submitted): Promise<Completed> {
    const completion = new Promise<Completed>((resolve, reject) => {
      this.rejections.add(reject);
      this.waiting.set(head, (completed) => {
        this.rejections.delete(reject);
        resolve(completed);
      });
    });
    if (notify) this.ringDoorbell();
    return completion;
  }

  private onCall(): void {
    this.calls += drainEventfd(this.call.number);
    this.watch.rearm();
    this.collect();
  }
}
