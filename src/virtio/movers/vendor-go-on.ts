import type { Deadline } from "../../base/deadline.ts";
import { VhostdError } from "../../base/errors.ts";
import type { InternalStatusName } from "../admin/vendor.ts";
import { readSaved, repeatable, withQueuesOf } from "../admin/vendor-state.ts";
import type { DeviceState } from "../device-state.ts";
import { Status } from "../features.ts";
import type { MoverHost } from "../mover.ts";
import { describeStatus } from "../pci-device.ts";
import type { ManagedVf } from "./vendor.ts";
import type { InternalSteps } from "./vendor-steps.ts";

/** A device that should run and stands still. */
export interface GoOnTask {
  readonly host: MoverHost;
  readonly vf: ManagedVf;
  readonly found: InternalStatusName;
  /** What it was configured with. */
  readonly running: DeviceState;
  /** Lets it run. @returns its status afterwards */
  readonly letGo: () => Promise<number>;
}

/**
 * Lets a device go on from where an earlier process left it that was stopping it, or changing its queues.
 * @throws VhostdError where it does not go on from there
 */
export async function goOn(steps: InternalSteps, task: GoOnTask, deadline: Deadline): Promise<void> {
  const { host, vf, found, running } = task;
  // One that has not drained may refuse to freeze, and was given no other state.
  if (found === "freezed" || (await steps.tryFreeze(deadline))) {
    const saved = await vf.admin.save(vf.vdevId, deadline);
    const own = host.control()?.index;
    readSaved(saved, withQueuesOf(saved, running, own), host.device.fn.address, own);
    // Whatever it was being given must not come into force by half.
    const whole = found === "freezed" ? repeatable(saved, host.deviceClass) : undefined;
    if (whole !== undefined) await vf.admin.restore(vf.vdevId, whole, deadline);
  }
  const status = await task.letGo();
  if ((status & Status.driverOk) !== 0) return;
  throw new VhostdError("io", `it does not run: ${describeStatus(status)}`);
}
