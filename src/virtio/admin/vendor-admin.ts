import { both } from "../../base/both.ts";
import type { Deadline } from "../../base/deadline.ts";
import { VhostdError } from "../../base/errors.ts";
import { TRANSFER_MAX } from "./admin-memory.ts";
import type { AdminQueue } from "./admin-queue.ts";
import { AdminChannel, AdminRefusal, type AdminRequest } from "./admin-request.ts";
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
  /** Bytes of the last state of each VF: those of the next are mostly as many. */
  private readonly sizes = new Map<number, number>();

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

  /** @param tries as of AdminRequest @throws VhostdError io */
  async status(vdevId: number, deadline: Deadline, tries?: "ahead"): Promise<InternalStatusName> {
    const data = VDEV_DATA.encode({ vdevId });
    const request: Request = { command: "getStatus", vdevId, data, resultLength: STATUS_RESULT.size };
    const { status } = STATUS_RESULT.read(
      await this.ask(tries === undefined ? request : { ...request, tries }, deadline),
    );
    const name = internalStatusName(status);
    if (name === undefined)
      throw new VhostdError("io", `${vdevName(vdevId)} has the internal status ${status}; 0 to 3`);
    return name;
  }

  /** One step. @param tries as of AdminRequest @throws VhostdError quiesceFailed, freezeFailed; io for running */
  async modify(vdevId: number, to: SettableStatus, deadline: Deadline, tries?: "once" | "ahead"): Promise<void> {
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
    const [size, begin] = await both(this.pendingBytes(vdevId, deadline), this.guess(vdevId, deadline));
    this.sizes.set(vdevId, size);
    const blob = new Uint8Array(size);
    blob.set(begin.subarray(0, size));
    for (const { offset, length } of pieces(begin.length, size)) {
      blob.set(await this.readPiece(vdevId, offset, length, deadline), offset);
    }
    try {
      return decodeState(blob);
    } catch (cause) {
      if (!(cause instanceof VhostdError)) throw cause;
      throw new VhostdError("stateSave", `${vdevName(vdevId)}: ${cause.message}`, { cause });
    }
  }

  /** Into a freezed VF. @param tries as of AdminRequest @throws VhostdError io */
  async restore(vdevId: number, state: VendorState, deadline: Deadline, tries?: "once"): Promise<void> {
    const blob = encodeState(state);
    for (const { offset, length } of pieces(0, blob.length)) {
      const data = transfer(vdevId, offset, length);
      const payload = blob.subarray(offset, offset + length);
      const request: Request = { command: "restore", vdevId, data, payload };
      await this.ask(tries === undefined ? request : { ...request, tries }, deadline);
    }
  }

  /** The begin of a state, where it is as long as the last one; else nothing. */
  private async guess(vdevId: number, deadline: Deadline): Promise<Uint8Array> {
    const nothing = new Uint8Array(0);
    const size = this.sizes.get(vdevId);
    if (size === undefined) return nothing;
    return await this.readPiece(vdevId, 0, Math.min(size, TRANSFER_MAX), deadline, "once").catch((error) => {
      if (error instanceof AdminRefusal) return nothing;
      throw error;
    });
  }

  private readPiece(
    vdevId: number,
    offset: number,
    length: number,
    deadline: Deadline,
    tries?: "once",
  ): Promise<Uint8Array> {
    const data = transfer(vdevId, offset, length);
    const request: Request = { command: "save", vdevId, data, resultLength: length, code: "stateSave" };
    return this.ask(tries === undefined ? request : { ...request, tries }, deadline);
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

/** Transfers from `begin` to `end`, bytes. */
function pieces(begin: number, end: number): { readonly offset: number; readonly length: number }[] {
  return Array.from({ length: Math.max(0, Math.ceil((end - begin) / TRANSFER_MAX)) }, (_, i) => {
    const offset = begin + i * TRANSFER_MAX;
    return { offset, length: Math.min(TRANSFER_MAX, end - offset) };
  });
}
