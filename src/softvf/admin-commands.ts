import type { StructValue } from "../base/layout.ts";
import {
  ADMIN_HEADER,
  AdminClass,
  IDENTITY_RESULT,
  InternalStatus,
  internalStatusName,
  MigrationCommand,
  type MigrationCommandName,
  MODIFY_STATUS_DATA,
  PENDING_RESULT,
  STATUS_RESULT,
  TRANSFER_DATA,
  type TrackingModeName,
  VDEV_DATA,
} from "../virtio/admin/vendor.ts";
import { AdminError } from "./admin-error.ts";
import { needRoom, readData } from "./command-data.ts";
import type { ManagedVf } from "./managed-vf.ts";
import { decodeTracking, executeTracking, type TrackingCommand, trackingIdentity } from "./tracking-commands.ts";

/** Version of the commands that is answered to identity. */
const VERSION = { major: 1, minor: 0, tertiary: 0 } as const;

/** A command, taken apart. */
export type AdminCommand = StateCommand | TrackingCommand;

/** A command of class 64. */
type StateCommand =
  | { readonly name: "identity" }
  | { readonly name: "getStatus" | "pendingBytes"; readonly vdevId: number }
  | { readonly name: "modifyStatus"; readonly vdevId: number; readonly status: number }
  | { readonly name: "save"; readonly vdevId: number; readonly offset: number; readonly length: number }
  | { readonly name: "restore"; readonly vdevId: number; readonly offset: number; readonly piece: Uint8Array };

/**
 * The one place where the bytes of a command are held against what a command is.
 * @param readable all device-readable bytes of the chain
 * @param room device-writable bytes for the result, without the status
 * @param modes of tracking that the PF offers
 * @throws AdminError invalidClass, invalidCommand, dataTransfer, error
 */
export function decodeCommand(readable: Uint8Array, room: number, modes: ReadonlySet<TrackingModeName>): AdminCommand {
  const header = readData(ADMIN_HEADER, readable);
  const data = readable.subarray(ADMIN_HEADER.size);
  if (header.class === AdminClass.dirtyPages && modes.size > 0) {
    return decodeTracking(header.command, data, room, modes);
  }
  if (header.class !== AdminClass.migration) throw new AdminError("invalidClass", `there is no class ${header.class}`);
  const name = Object.entries(MigrationCommand).find(([, number]) => number === header.command)?.[0];
  if (name === undefined) throw new AdminError("invalidCommand", `there is no command ${header.command}`);
  switch (name as MigrationCommandName) {
    case "identity":
      needRoom(room, IDENTITY_RESULT.size);
      return { name: "identity" };
    case "getStatus":
      needRoom(room, STATUS_RESULT.size);
      return { name: "getStatus", ...readData(VDEV_DATA, data) };
    case "pendingBytes":
      needRoom(room, PENDING_RESULT.size);
      return { name: "pendingBytes", ...readData(VDEV_DATA, data) };
    case "modifyStatus":
      return { name: "modifyStatus", ...readData(MODIFY_STATUS_DATA, data) };
    case "save": {
      const { vdevId, offset, length } = transfer(data);
      needRoom(room, length);
      return { name: "save", vdevId, offset, length };
    }
    case "restore": {
      const { vdevId, offset, length } = transfer(data);
      const bytes = data.subarray(TRANSFER_DATA.size);
      if (bytes.length < length) {
        throw new AdminError("dataTransfer", `${bytes.length} bytes of state have come; ${length} announced`);
      }
      return { name: "restore", vdevId, offset, piece: bytes.subarray(0, length) };
    }
  }
}

/** @returns the result. @throws AdminError */
export async function execute(command: AdminCommand, vfs: readonly ManagedVf[]): Promise<Uint8Array> {
  if (command.name === "identity") return IDENTITY_RESULT.encode(VERSION);
  if (command.name === "trackingIdentity") return trackingIdentity();
  const vf = vfs[command.vdevId - 1];
  if (vf === undefined) throw new AdminError("error", `there is no vdev ${command.vdevId}; 1 to ${vfs.length}`);
  const nothing = new Uint8Array(0);
  switch (command.name) {
    case "getStatus":
      return STATUS_RESULT.encode({ status: InternalStatus[vf.status] });
    case "modifyStatus": {
      const status = internalStatusName(command.status);
      if (status === undefined) throw new AdminError("error", `there is no internal status ${command.status}`);
      await vf.modify(status);
      return nothing;
    }
    case "pendingBytes":
      return PENDING_RESULT.encode({ pending: BigInt(await vf.pending()) });
    case "save":
      return vf.save(command.offset, command.length);
    case "restore":
      await vf.restore(command.offset, command.piece);
      return nothing;
    default:
      return executeTracking(command, vf.tracker);
  }
}

/** Numbers beyond 2^53 are beyond any state, too. */
function transfer(data: Uint8Array) {
  const { vdevId, offset, length }: StructValue<(typeof TRANSFER_DATA)["fields"]> = readData(TRANSFER_DATA, data);
  return { vdevId, offset: Number(offset), length: Number(length) };
}
