import { VhostdError } from "../../base/errors.ts";
import type { OperationQueue } from "../../base/operation-queue.ts";
import { duplicate } from "../../native/fd.ts";
import { IrqIndex } from "../../vfio-user/messages.ts";
import type { Interrupts } from "../function.ts";
import type { VfioDevice } from "./device.ts";
import { NO_EVENTFD } from "./device-uapi.ts";

/**
 * The MSI-X vectors of a function. All are enabled when it is opened, going nowhere: kernels before 6.5 add none later
 * without switching off those in use.
 */
export class VfioInterrupts implements Interrupts {
  private constructor(
    private readonly device: VfioDevice,
    private readonly operations: OperationQueue,
    readonly count: number,
  ) {}

  /**
   * @param operations what is asked of the function beside this, one after the other
   * @throws VhostdError interruptEnable
   */
  static async enable(device: VfioDevice, operations: OperationQueue): Promise<VfioInterrupts> {
    let count = await device.interrupts(IrqIndex.msix);
    for (let short = count; short > 0; ) {
      count = short;
      try {
        short = await device.setEventfds(IrqIndex.msix, 0, new Array<number>(count).fill(NO_EVENTFD));
      } catch (cause) {
        throw new VhostdError("interruptEnable", `the ${count} vectors of ${device.name} could not be enabled`, {
          cause,
        });
      }
      // The machine has fewer vectors left than the function could use.
      if (short >= count) throw new VhostdError("interruptEnable", `${device.name} has ${short} of ${count} vectors`);
    }
    return new VfioInterrupts(device, operations, count);
  }

  /** Goes on with vectors that another process has enabled, without a word to the kernel: they stay routed as they are. */
  static revive(device: VfioDevice, operations: OperationQueue, count: number): VfioInterrupts {
    return new VfioInterrupts(device, operations, count);
  }

  async route(vector: number, eventfd: number | null): Promise<void> {
    const { name } = this.device;
    if (!Number.isInteger(vector) || vector < 0 || vector >= this.count) {
      throw new VhostdError("noVectors", `${name} has no vector ${vector}; it has ${this.count}`);
    }
    // The caller may close the eventfd before its turn comes: its number could be another file's then.
    using own = eventfd === null ? undefined : duplicate(eventfd);
    const eventfds = [own?.number ?? NO_EVENTFD];
    try {
      await this.operations.run(() => this.device.setEventfds(IrqIndex.msix, vector, eventfds));
    } catch (cause) {
      throw new VhostdError("interruptRegistration", `vector ${vector} of ${name} could not be routed`, { cause });
    }
  }
}
