import type { Deadline } from "../../base/deadline.ts";
import { AdminRefusal } from "../admin/admin-request.ts";
import { toVendorState } from "../admin/vendor-state.ts";
import type { DeviceState } from "../device-state.ts";
import type { MoverHost } from "../mover.ts";
import type { ManagedVf } from "./vendor.ts";
import type { InternalSteps } from "./vendor-steps.ts";

export interface ProgramTask {
  readonly host: MoverHost;
  readonly vf: ManagedVf;
  readonly wanted: DeviceState;
  /** It is tried at once. */
  readonly mayBeFreezed: boolean;
}

/** Writes the whole state into a device, wherever that is: it takes one only where it stands still. */
export async function program(steps: InternalSteps, task: ProgramTask, deadline: Deadline): Promise<void> {
  const { host, wanted, mayBeFreezed } = task;
  const { admin, vdevId } = task.vf;
  const state = toVendorState(wanted, host, host.device.configGeneration);
  if (mayBeFreezed) {
    try {
      return await admin.restore(vdevId, state, deadline, "once");
    } catch (error) {
      if (!(error instanceof AdminRefusal)) throw error;
      await steps.bringTo("freezed", deadline);
    }
  } else await steps.freeze(deadline);
  await admin.restore(vdevId, state, deadline);
}
