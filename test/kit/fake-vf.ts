import { decodeState, encodeState, type VendorState } from "../../src/virtio/admin/state-blob.ts";
import {
  ADMIN_DO_NOT_RETRY,
  AdminStatus,
  IDENTITY_RESULT,
  INTERNAL_STEPS,
  InternalStatus,
  type InternalStatusName,
  internalStatusName,
  MODIFY_STATUS_DATA,
  PENDING_RESULT,
  STATUS_RESULT,
  TRANSFER_DATA,
} from "../../src/virtio/admin/vendor.ts";
import { Status } from "../../src/virtio/features.ts";
import type { FakeAnswer, FakeCommand } from "./fake-admin.ts";
import type { FakeFunction } from "./fake-function.ts";
import type { FakeTracking } from "./fake-tracking.ts";

/** A VF as its PF manages it. Give it the registers of the VF where they matter. */
export class FakeVf {
  /** Its registers: a reset by them leads to init, a restored status shows in them. */
  fn: FakeFunction | undefined;
  /** What it saves. */
  state: VendorState | undefined;
  /** Bytes that it saves instead. */
  blob: Uint8Array | undefined;
  /** While the pages that it writes are marked. */
  tracking: FakeTracking | undefined;
  /** Statuses that were asked for and taken, in order. */
  readonly steps: InternalStatusName[] = [];
  /** Every state that was restored. */
  readonly restored: VendorState[] = [];
  private internal: InternalStatusName = "init";
  private incoming: number[] = [];
  private resets = 0;

  get status(): InternalStatusName {
    const resets = this.fn?.statusWrites.filter((value) => value === 0).length ?? 0;
    if (resets !== this.resets && this.fn?.status !== undefined) {
      this.resets = resets;
      this.internal = "init";
    }
    const driverOk = ((this.fn?.status ?? 0) & Status.driverOk) !== 0;
    return this.internal === "init" && driverOk ? "running" : this.internal;
  }

  /** @returns a status code */
  change(to: InternalStatusName | undefined): number {
    const from = this.status;
    if (to === undefined || !INTERNAL_STEPS[from].includes(to)) return refused(AdminStatus.error);
    if (from === "freezed" && this.incoming.length > 0) {
      this.state = decodeState(Uint8Array.from(this.incoming));
      this.incoming = [];
      this.restored.push(this.state);
      this.show(this.state);
    }
    this.internal = to;
    this.steps.push(to);
    return AdminStatus.ok;
  }

  save(): Uint8Array {
    return this.blob ?? (this.state === undefined ? new Uint8Array(0) : encodeState(this.state));
  }

  /** @returns a status code */
  restore(offset: number, bytes: Uint8Array): number {
    if (this.status !== "freezed") return refused(AdminStatus.error);
    if (offset === 0) this.incoming = [];
    if (offset !== this.incoming.length) return refused(AdminStatus.dataTransfer);
    this.incoming.push(...bytes);
    return AdminStatus.ok;
  }

  /** In the registers. */
  private show({ common, queues }: VendorState): void {
    if (this.fn === undefined) return;
    this.fn.status = common.status;
    for (const { index, enable } of queues) this.fn.queues[index]!.enable = enable;
  }
}

/** What a device answers that has these VFs and keeps to the rules. */
export function honestAnswer(
  vfs: readonly FakeVf[],
  { name, class: group, vdevId, data, payload }: FakeCommand,
): FakeAnswer {
  if (name === undefined) {
    return { status: refused(group === 64 ? AdminStatus.invalidCommand : AdminStatus.invalidClass) };
  }
  if (name === "identity") return { status: 0, result: IDENTITY_RESULT.encode({ major: 1 }) };
  const vf = vfs[vdevId - 1];
  if (vf === undefined) return { status: refused(AdminStatus.error) };
  switch (name) {
    case "getStatus":
      return { status: 0, result: STATUS_RESULT.encode({ status: InternalStatus[vf.status] }) };
    case "modifyStatus":
      return { status: vf.change(internalStatusName(MODIFY_STATUS_DATA.read(data).status)) };
    case "pendingBytes":
      return { status: 0, result: PENDING_RESULT.encode({ pending: BigInt(vf.save().length) }) };
    case "save": {
      const { offset, length } = TRANSFER_DATA.read(data);
      return { status: 0, result: vf.save().subarray(Number(offset), Number(offset + length)) };
    }
    case "restore":
      return { status: vf.restore(Number(TRANSFER_DATA.read(data).offset), payload) };
    default:
      return { status: refused(AdminStatus.invalidCommand) };
  }
}

/** A status that says not to try again. */
export function refused(code: number): number {
  return code | ADMIN_DO_NOT_RETRY;
}
