import { struct } from "../../base/layout.ts";

/**
 * The vendor's administration commands, as NVIDIA's firmware speaks them today: a form older than the commands of
 * VIRTIO 1.3. A command is a chain of device-readable buffers (header, data) and device-writable ones (result, and
 * the status in a last descriptor of one byte).
 */

export const ADMIN_HEADER = struct("admin command header", 2, { class: [0, "u8"], command: [1, "u8"] });

export const AdminClass = { migration: 64 } as const;

/** Commands of class 64. */
export const MigrationCommand = {
  identity: 0,
  getStatus: 1,
  modifyStatus: 2,
  pendingBytes: 3,
  save: 4,
  restore: 5,
} as const;
export type MigrationCommandName = keyof typeof MigrationCommand;

/** A VF is named by its index among the PF's VFs plus one; 0 is the PF itself. */
export function vdevId(vfIndex: number): number {
  return vfIndex + 1;
}

/** For people, who count VFs from 0. */
export function vdevName(vdevId: number): string {
  return vdevId === 0 ? "the PF" : `virtfn${vdevId - 1}`;
}

export const IDENTITY_RESULT = struct("identity result", 8, {
  major: [0, "u16"],
  minor: [2, "u16"],
  tertiary: [4, "u16"],
});
/** Data of getStatus and pendingBytes. */
export const VDEV_DATA = struct("vdev", 4, { vdevId: [0, "u16"] });
export const STATUS_RESULT = struct("status result", 4, { status: [0, "u16"] });
export const MODIFY_STATUS_DATA = struct("modify status", 4, { vdevId: [0, "u16"], status: [2, "u16"] });
export const PENDING_RESULT = struct("pending bytes result", 8, { pending: [0, "u64"] });
/** Head of save and of restore, whose state follows in a descriptor of its own. Bytes. */
export const TRANSFER_DATA = struct("state transfer", 24, {
  vdevId: [0, "u16"],
  offset: [8, "u64"],
  length: [16, "u64"],
});

/** The last byte of a command: a code, and whether it makes sense to try again. */
export const AdminStatus = {
  ok: 0,
  error: 1,
  invalidClass: 2,
  invalidCommand: 3,
  dataTransfer: 4,
  internal: 5,
} as const;
export const ADMIN_STATUS_CODE = 0x7f;
export const ADMIN_DO_NOT_RETRY = 0x80;

/** Internal status of a VF: init after a reset; quiesced masters no new transactions; the state of freezed is final. */
export const InternalStatus = { init: 0, running: 1, quiesced: 2, freezed: 3 } as const;
export type InternalStatusName = keyof typeof InternalStatus;

/** What a command can set: `init` is reached by a reset only. */
export type SettableStatus = Exclude<InternalStatusName, "init">;

/** What each command of the status may lead to. */
export const INTERNAL_STEPS: Readonly<Record<InternalStatusName, readonly InternalStatusName[]>> = {
  init: ["quiesced", "running"],
  running: ["quiesced"],
  quiesced: ["running", "freezed"],
  freezed: ["quiesced"],
};

/** The commands, in order, that lead to `to`; none where the VF is there. */
export function stepsTo(from: InternalStatusName, to: SettableStatus): SettableStatus[] {
  if (from === to) return [];
  return INTERNAL_STEPS[from].includes(to) ? [to] : ["quiesced", to];
}

/** undefined for a number that no status has. */
export function internalStatusName(value: number): InternalStatusName | undefined {
  return (Object.keys(InternalStatus) as InternalStatusName[]).find((name) => InternalStatus[name] === value);
}
