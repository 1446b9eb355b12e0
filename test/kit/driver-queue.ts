import { asError, VhostdError } from "../../src/base/errors.ts";
import type { OwnedFd } from "../../src/native/fd.ts";
import { type Watch, watch } from "../../src/native/poller.ts";
import { drainEventfd, eventfd } from "../../src/native/sys.ts";
import type { Completed, DriverRing, RawBuffer, Submitted } from "./driver-ring.ts";

/** The eventfd that the device signals, and who looks at it. */
interface Call {
  readonly fd: OwnedFd;
  readonly watch: Watch;
}

interface Waiting {
  resolve(completed: Completed): void;
  reject(error: Error): void;
}

/**
 * A ring with its call: requests as promises. The owner gives `call` to the device and says how the doorbell is rung.
 */
export class DriverQueue implements Disposable {
  private current: Call;
  private readonly waiting = new Map<number, Waiting>();
  /** Why no request is answered any more. */
  private ended: Error | undefined;
  /** Signals of call eventfds seen. */
  calls = 0;
  /** Chains made available. */
  submitted = 0;
  /** Chains that the device gave back. */
  returned = 0;

  constructor(
    readonly ring: DriverRing,
    private ringDoorbell: () => void,
  ) {
    this.current = this.newCall();
  }

  /** The device signals this eventfd. */
  get call(): OwnedFd {
    return this.current.fd;
  }

  /**
   * A new call eventfd in the place of the old one, which is closed: completions wait until the device signals this one.
   * @param ringDoorbell how the doorbell is rung from now on
   */
  rewire(ringDoorbell: () => void): void {
    closeCall(this.current);
    this.current = this.newCall();
    this.ringDoorbell = ringDoorbell;
  }

  /**
   * One chain, from submission to completion.
   * @throws RangeError where the ring is full; VhostdError cancelled where the queue is disposed of first; what
   *   `DriverRing.completions` throws where the device breaks the ring
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
      this.returned++;
      const waiting = this.waiting.get(completed.head);
      this.waiting.delete(completed.head);
      waiting?.resolve(completed);
    }
  }

  [Symbol.dispose](): void {
    if (!this.current.fd.closed) closeCall(this.current);
    this.end(new VhostdError("cancelled", "the queue was disposed of"));
  }

  private await({ head, notify }: Submitted): Promise<Completed> {
    this.submitted++;
    const completion = new Promise<Completed>((resolve, reject) => {
      if (this.ended === undefined) this.waiting.set(head, { resolve, reject });
      else reject(this.ended);
    });
    if (notify) this.ringDoorbell();
    return completion;
  }

  private newCall(): Call {
    const fd = eventfd();
    const call = { fd, watch: watch(fd.number, "in", () => this.onCall(call)) };
    return call;
  }

  private onCall({ fd, watch }: Call): void {
    this.calls += drainEventfd(fd.number);
    watch.rearm();
    try {
      this.collect();
    } catch (error) {
      this.end(asError(error));
    }
  }

  private end(error: Error): void {
    this.ended ??= error;
    const waiting = [...this.waiting.values()];
    this.waiting.clear();
    for (const { reject } of waiting) reject(error);
  }
}

function closeCall({ fd, watch }: Call): void {
  watch[Symbol.dispose]();
  fd[Symbol.dispose]();
}
