import { VhostdError } from "../../base/errors.ts";
import type { OwnedFd } from "../../native/fd.ts";
import { type Watch, watch } from "../../native/poller.ts";
import { eventfd } from "../../native/sys.ts";
import { IrqIndex } from "../../vfio-user/messages.ts";
import type { RegisterSpace } from "../function.ts";
import type { VfioDevice } from "./device.ts";

/** Milliseconds between two looks whether the function answers. */
const CHECK_INTERVAL = 1000;
/** Looks in a row without an answer: a device that starts its firmware anew is away for a moment. */
const SILENT_LOOKS = 2;
/**
 * Revision and class code (PCI Local Bus 3.0, 6.2.1). The vendor id would not do: the kernel answers for it, because VFs
 * have none.
 */
const CLASS_REGISTER = 0x8;
const ALL_ONES = 0xffff_ffff;

/** The eventfds of a watch, by name. */
export const LOSS_FDS = ["error", "request"] as const;

/** The interrupts by which the kernel says that a function is lost. */
const NOTICES = [
  {
    index: IrqIndex.error,
    name: "error",
    code: "io",
    says: "reported an error that it does not recover from (AER)",
    fix: "the kernel log says which; reset or replace the device, then add it again",
  },
  {
    index: IrqIndex.request,
    name: "request",
    code: "noDevice",
    says: "is wanted back by the kernel: it is being unplugged, or taken from vfio-pci",
    fix: "add it again when it is back and bound to vfio-pci",
  },
] as const;

/** Sees when a function is gone, or is to be given back. */
export class LossWatch implements Disposable {
  readonly lost: Promise<Error>;
  private readonly resolve: (reason: Error) => void;
  private readonly eventfds = new Map<string, OwnedFd>();
  private watches: Watch[] = [];
  private timer: ReturnType<typeof setInterval> | undefined;
  private busy = false;
  private silent = 0;

  private constructor(private readonly device: VfioDevice) {
    const { promise, resolve } = Promise.withResolvers<Error>();
    this.lost = promise;
    this.resolve = resolve;
  }

  /** Routes the two interrupts, where the device has them. @throws VhostdError */
  static async on(device: VfioDevice): Promise<LossWatch> {
    using undo = new DisposableStack();
    const loss = undo.use(new LossWatch(device));
    const routed = NOTICES.map(async (notice) => {
      if ((await device.interrupts(notice.index)) === 0) return;
      const signal = eventfd();
      loss.eventfds.set(notice.name, signal);
      await device.setEventfds(notice.index, 0, [signal.number]);
      loss.heed(notice, signal);
    });
    // Not before all have ended: what one routes the other's failure would close.
    for (const result of await Promise.allSettled(routed)) if (result.status === "rejected") throw result.reason;
    undo.move();
    return loss;
  }

  /**
   * Goes on with the eventfds of another process, by name, which the interrupts are routed to; nothing is asked of the device.
   * Takes them. One that was signalled meanwhile counts.
   */
  static revive(device: VfioDevice, eventfds: ReadonlyMap<string, OwnedFd>): LossWatch {
    const loss = new LossWatch(device);
    for (const notice of NOTICES) {
      const signal = eventfds.get(notice.name);
      if (signal === undefined) continue;
      loss.eventfds.set(notice.name, signal);
      loss.heed(notice, signal);
    }
    return loss;
  }

  /** Looks again and again whether the function still answers. @param interval milliseconds */
  check(config: RegisterSpace, interval = CHECK_INTERVAL): void {
    this.timer = setInterval(() => void this.look(config), interval);
    this.timer.unref();
  }

  /** Our eventfds, borrowed. */
  get fds(): ReadonlyMap<string, number> {
    return new Map([...this.eventfds].map(([name, fd]) => [name, fd.number]));
  }

  [Symbol.dispose](): void {
    this.stopChecks();
    for (const each of this.watches) each[Symbol.dispose]();
    for (const fd of this.eventfds.values()) fd[Symbol.dispose]();
    this.watches = [];
    this.eventfds.clear();
  }

  /** @param signal borrowed until disposal */
  private heed({ code, says, fix }: (typeof NOTICES)[number], signal: OwnedFd): void {
    const watching = watch(signal.number, "in", () => {
      this.end(new VhostdError(code, `${this.device.name} ${says}`, { fix }));
    });
    watching.unref();
    this.watches.push(watching);
  }

  private async look(config: RegisterSpace): Promise<void> {
    // A reset makes the look before this one wait.
    if (this.busy) return;
    this.busy = true;
    const seen = await config.read(CLASS_REGISTER, 4).catch(() => ALL_ONES);
    this.busy = false;
    this.silent = seen === ALL_ONES ? this.silent + 1 : 0;
    if (this.silent < SILENT_LOOKS || this.timer === undefined) return;
    const fix = "look in the kernel log; reset or replace the device, then add it again";
    this.end(new VhostdError("noDevice", `${this.device.name} does not answer any more: it reads all ones`, { fix }));
  }

  private end(reason: Error): void {
    this.stopChecks();
    this.resolve(reason);
  }

  private stopChecks(): void {
    clearInterval(this.timer);
    this.timer = undefined;
  }
}
