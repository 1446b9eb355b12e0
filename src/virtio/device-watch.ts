import { VhostdError } from "../base/errors.ts";
import { Status } from "./features.ts";
import { describeStatus, type VirtioPciDevice } from "./pci-device.ts";

/** Milliseconds between two looks at a device that runs: one that was reset or unplugged signals nothing. */
const LOOK_INTERVAL = 2000;

/** `gone`: there is no function any more, or not the one that was set up. Otherwise the device works again after a reset. */
export interface DeviceFailure {
  readonly gone: boolean;
  readonly error: Error;
}

/** Notices that a device is gone, or was reset behind its driver's back, and passes on what else is wrong with it. */
export class DeviceWatch implements Disposable {
  private handler: (failure: DeviceFailure) => void = () => {};
  private gone: DeviceFailure | undefined;
  /** Operations under way, in the middle of which the device may be in any state. */
  private changes = 0;
  private timer: ReturnType<typeof setTimeout> | undefined;
  private closed = false;
  private hasAsked = false;

  /**
   * @param isRunning whether the device should have its queues now
   * @param interval milliseconds between two looks
   */
  constructor(
    private readonly device: VirtioPciDevice,
    private readonly isRunning: () => boolean,
    private readonly interval = LOOK_INTERVAL,
  ) {
    void device.gone.then((error) => this.report({ gone: true, error }));
    this.lookLater();
  }

  /** Replaces the earlier handler, which is told soon where the function is gone already. */
  onFailure(handler: (failure: DeviceFailure) => void): void {
    this.handler = handler;
    const { gone } = this;
    if (gone !== undefined) queueMicrotask(() => this.report(gone));
  }

  report(failure: DeviceFailure): void {
    if (this.closed) return;
    if (failure.gone) this.gone = failure;
    this.handler(failure);
  }

  /** Whether a status says that the device cannot go on (VIRTIO 1.2, 2.1.2); passed on once until it says so no more. */
  asksForReset(status: number): boolean {
    const asks = (status & Status.needsReset) !== 0;
    if (asks && !this.hasAsked) {
      const { address } = this.device.fn;
      this.report({
        gone: false,
        error: new VhostdError("io", `${address} asks for a reset: ${describeStatus(status)}`),
      });
    }
    this.hasAsked = asks;
    return asks;
  }

  /** The device is not looked at until the change is over. */
  change(): Disposable {
    this.changes++;
    // After it the device may ask anew.
    this.hasAsked = false;
    return {
      [Symbol.dispose]: () => {
        this.changes--;
        this.lookLater();
      },
    };
  }

  [Symbol.dispose](): void {
    this.closed = true;
    clearTimeout(this.timer);
  }

  private lookLater(): void {
    clearTimeout(this.timer);
    if (this.closed || this.changes > 0 || !this.isRunning()) return;
    this.timer = setTimeout(() => void this.look(), this.interval);
    this.timer.unref();
  }

  /**
   * A device that fell back to status 0 has forgotten its queues; the interrupt of one that asks for a reset may have been
   * lost. One that does not answer says so by itself.
   */
  private async look(): Promise<void> {
    const status = await this.device.status().catch(() => undefined);
    if (this.changes > 0) return;
    if (status !== undefined && this.asksForReset(status)) return this.lookLater();
    if (status === 0 && this.isRunning()) {
      const { address } = this.device.fn;
      const error = new VhostdError("io", `${address} was reset by somebody else: its status fell to 0 while it ran`);
      return this.report({ gone: true, error });
    }
    this.lookLater();
  }
}
