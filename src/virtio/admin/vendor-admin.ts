import type { Deadline } from "../../base/deadline.ts";
import { VhostdError } from "../../base/errors.ts";
import { TRANSFER_MAX } from "./admin-memory.ts";
import type { AdminQueue } from "./admin-queue.ts";
import { AdminChannel, type AdminRequest } from "./admin-request.ts";
import { DirtyPagesAdmin } from "./dirty-pages-admin.ts";
import { BLOB_SIZE_MAX, decodeState, encodeState, type VendorState } from "./state-blob.ts";
import {
  AdminClass,
  IDENTITY_RESULT,
  InternalStatus,
  type InternalStatusName,
  internalStatusName,
  MigrationCommand,
  type MigrationCommandName,
  MODIFY_STATUS_DATA,
  PENDING_RESULT,
  type SettableStatus,
  STATUS_RESULT,
  TRANSFER_DATA,
  VDEV_DATA,
  vdevName,
} from "./vendor.ts";

/** Commands that may change a VF whenever the device comes to them, be it long after anybody waited. */
const ALTERING: readonly MigrationCommandName[] = ["modifyStatus", "restore"];
type Request = Omit<AdminRequest, "class" | "number" | "name" | "alters"> & {
  readonly command: MigrationCommandName;
};

/**
 * The vendor's commands over an admin queue. A VF is named by its vdev id. All throw VhostdError adminQueue where the
 * queue is dead; where the device refuses or does not answer in time, the code that each one names. A command is tried
 * again where the device allows it and there is time. What cannot be asked of a VF now is refused with busy.
 */
export class VendorAdmin {
  /** The same channel's commands of class 65. */
  readonly dirtyPages: DirtyPagesAdmin;
  private readonly channel: AdminChannel;

  /** @param retryInterval milliseconds between two tries; 1 s */
  constructor(
    readonly queue: AdminQueue,
    retryInterval?: number,
  ) {
    this.channel = new AdminChannel(queue, retryInterval);
    this.dirtyPages = new DirtyPagesAdmin(this.channel);
  }

  /** Why the state of a VF cannot be moved now, or undefined. It may be so for a while only. */
  obstacle(vdevId: number): string | undefined {
    return this.queue.obstacle(vdevId);
  }

  /** The version of the commands: "1.0.0". @throws VhostdError io, AdminRefusal */
  async identity(deadline: Deadline): Promise<string> {
    const request: Request = { command: "identity", vdevId: 0, resultLength: IDENTITY_RESULT.size };
    const { major, minor, tertiary } = IDENTITY_RESULT.read(await this.ask(request, deadline));
    return `${major}.${minor}.${tertiary}`;
  }

  /** @throws VhostdError io */
  async status(vdevId: number, deadline: Deadline): Promise<InternalStatusName> {
    const data = VDEV_DATA.encode({ vdevId });
    const result = await this.ask({ command: "getStatus", vdevId, data, resultLength: STATUS_RESULT.size }, deadline);
    const { status } = STATUS_RESULT.read(result);
    const name = internalStatusName(status);
    if (name === undefined)
      throw new VhostdError("io", `${vdevName(vdevId)} has the internal status ${status}; 0 to 3`);
    return name;
  }

  /** One step. @param tries as of AdminRequest @throws VhostdError quiesceFailed, freezeFailed; io for running */
  async modify(vdevId: number, to: SettableStatus, deadline: Deadline, tries?: "once"): Promise<void> {
    const data = MODIFY_STATUS_DATA.encode({ vdevId, status: InternalStatus[to] });
    const codes = { quiesced: "quiesceFailed", freezed: "freezeFailed", running: "io" } as const;
    const request: Request = { command: "modifyStatus", vdevId, data, code: codes[to] };
    await this.ask(tries === undefined ? request : { ...request, tries }, deadline);
  }

  /** Bytes of state that `save` will read. @throws VhostdError stateSave */
  async pendingBytes(vdevId: number, deadline: Deadline): Promise<number> {
    const data = VDEV_DATA.encode({ vdevId });
    const request: Request = {
      command: "pendingBytes",
      vdevId,
      data,
      resultLength: PENDING_RESULT.size,
      code: "stateSave",
    };
    const { pending } = PENDING_RESULT.read(await this.ask(request, deadline));
    if (pending === 0n || pending > BigInt(BLOB_SIZE_MAX)) {
      throw new VhostdError("stateSave", `${vdevName(vdevId)} has ${pending} bytes of state; 1 to ${BLOB_SIZE_MAX}`);
    }
    return Number(pending);
  }

  /** The state of a freezed VF. @throws VhostdError stateSave, also where the state makes no sense */
  async save(vdevId: number, deadline: Deadline): Promise<VendorState> {
    const blob = new Uint8Array(await this.pendingBytes(vdevId, deadline));
    for (const { offset, length } of pieces(blob.length)) {
      const data = transfer(vdevId, offset, length);
      const request: Request = { command: "save", vdevId, data, resultLength: length, code: "stateSave" };
      blob.set(await this.ask(request, deadline), offset);
    }
    try {
      return decodeState(blob);
    } catch (cause) {
      if (!(cause instanceof VhostdError)) throw cause;
      throw new VhostdError("stateSave", `${vdevName(vdevId)}: ${cause.message}`, { cause });
    }
  }

  /** Into a freezed VF. @throws VhostdError io */
  async restore(vdevId: number, state: VendorState, deadline: Deadline): Promise<void> {
    const blob = encodeState(state);
    for (const { offset, length } of pieces(blob.length)) {
      const data = transfer(vdevId, offset, length);
      const payload = blob.subarray(offset, offset + length);
      await this.ask({ command: "restore", vdevId, data, payload }, deadline);
    }
  }

  private ask({ command, ...rest }: Request, deadline: Deadline): Promise<Uint8Array> {
    const number = MigrationCommand[command];
    const alters = ALTERING.includes(command);
    return this.channel.ask({ class: AdminClass.migration, number, name: command, alters, ...rest }, deadline);
  }
}

function transfer(vdevId: number, offset: number, length: number): Uint8Array {
  return TRANSFER_DATA.encode({ vdevId, offset: BigInt(offset), length: BigInt(length) });
}

function pieces(length: number): { readonly offset: number; readonly length: number }[] {
  return Array.from({ length: Math.ceil(length / TRANSFER_MAX) }, (_, i) => {
    const offset = i * TRANSFER_MAX;
    return { offset, length: Math.min(TRANSFER_MAX, length - offset) };
  });
}
