import type { Deadline } from "../base/deadline.ts";
import { VhostdError } from "../base/errors.ts";
import type { Logger } from "../base/log.ts";
import type { OperationQueue } from "../base/operation-queue.ts";
import type { PciAddress } from "../pci/address.ts";
import type { InternalStatusName } from "../virtio/admin/vendor.ts";
import type { ManualControl } from "../virtio/mover.ts";
import type { Deadlines } from "./deadlines.ts";
import type { Patience } from "./patience.ts";
import type { VfParts } from "./vf-parts.ts";
import type { VfState } from "./vf-state.ts";

export type ManualTarget = Parameters<ManualControl["change"]>[0];

/** The VF whose status is moved. */
export interface ManualHost {
  readonly address: PciAddress;
  readonly parts: Pick<VfParts, "dataPath" | "mover">;
  readonly log: Logger;
  readonly deadlines: Deadlines;
  readonly operations: OperationQueue;
  readonly patience: Patience;
  state(): VfState;
  /** @throws VhostdError where the VF has failed */
  checkUsable(): void;
  onMoved(to: ManualTarget): void;
  /** Has it noted for who comes after this process. */
  note(): Promise<void>;
}

/** The internal status of one VF in other hands than those of its session: an operator's mostly. */
export class ManualStatus {
  private busy = false;

  constructor(private readonly vf: ManualHost) {}

  /**
   * Changes the status where `to` is given. @returns the status afterwards
   * @throws VhostdError notSupported where the VF is not managed; busy where no guest runs it: what stands in guest memory
   *   must not move then; quiesceFailed, freezeFailed, adminQueue
   */
  async move(to: ManualTarget | undefined): Promise<InternalStatusName> {
    const { address, deadlines, patience, operations } = this.vf;
    if (this.busy) throw new VhostdError("busy", `the status of ${address} is being asked for or changed already`);
    this.busy = true;
    try {
      const what = `${to === undefined ? "the internal status" : "a change of the internal status"} of ${address}`;
      const time = to === undefined ? deadlines.ask : deadlines.drain;
      const status = await patience.during(what, time, (deadline) => operations.run(() => this.moveBy(to, deadline)));
      // Not as one of the operations: a session that is to note it may be waiting for them.
      if (to !== undefined) await this.vf.note();
      return status;
    } finally {
      this.busy = false;
    }
  }

  private async moveBy(to: ManualTarget | undefined, deadline: Deadline): Promise<InternalStatusName> {
    const { address, parts } = this.vf;
    this.vf.checkUsable();
    const control = parts.dataPath.manual;
    if (control === undefined) {
      throw new VhostdError(
        "notSupported",
        `the state of ${address} cannot be moved: ${parts.mover.unmanagedReason()}`,
        {
          fix: '"vf -i" and "mgmtpf -l" show what the PF can do',
        },
      );
    }
    const { name } = this.vf.state();
    if (to !== undefined && name !== "running") {
      throw new VhostdError("busy", `${address} is ${name}: its status is changed while a guest runs it`, {
        fix: "start its guest first, or let it go on",
      });
    }
    deadline.check();
    if (to !== undefined) {
      await control.change(to, deadline);
      this.vf.onMoved(to);
    }
    return await control.status(deadline);
  }
}
