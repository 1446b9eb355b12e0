import { asError } from "../base/errors.ts";
import type { OwnedFd } from "../native/fd.ts";
import { type Watch, watch } from "../native/poller.ts";
import { drainEventfd, signalEventfd } from "../native/sys.ts";

/**
 * The eventfd on which a device tells of a change of its configuration space, or of its mind (VIRTIO 1.2, 2.1.2). It is its
 * own journal: a signal is taken out when it has been passed on, so that who comes after a process that dies finds it.
 */
export class ConfigInterrupt implements Disposable {
  private watch: Watch | undefined;
  private closed = false;

  /**
   * Takes the eventfd.
   * @param passOn resolves when everybody knows; what it rejects with is reported, and is no reason to try again
   */
  constructor(
    private readonly eventfd: OwnedFd,
    private readonly passOn: () => Promise<void>,
    private readonly report: (error: Error) => void,
  ) {}

  /** Borrowed. */
  get fd(): number {
    return this.eventfd.number;
  }

  /** Signals are passed on from now on, those of the time before as well. */
  listen(): void {
    if (!this.closed) this.watch ??= watch(this.fd, "in", () => void this.onSignal());
  }

  [Symbol.dispose](): void {
    this.closed = true;
    this.watch?.[Symbol.dispose]();
    this.eventfd[Symbol.dispose]();
  }

  private async onSignal(): Promise<void> {
    try {
      await this.passOn().catch((error) => this.report(asError(error)));
      if (this.closed) return;
      // The last of several may have come too late for what was passed on.
      if (drainEventfd(this.fd) > 1) signalEventfd(this.fd);
    } catch (error) {
      this.report(asError(error));
    }
    // Only now, so that a device that signals without end is answered at the pace of its own registers.
    if (!this.closed) this.watch?.rearm();
  }
}
