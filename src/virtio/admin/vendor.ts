import { struct } from "../../base/layout.ts";
import type { MapForm } from "../../native/dirty-log.ts";

/**
 * The vendor's administration commands, as NVIDIA's firmware speaks them today: a form older than the commands of
 * VIRTIO 1.3. A command is a chain of device-readable buffers (header, data) and device-writable ones (result, and
 * the status in a last descriptor of one byte).
 */

export const ADMIN_HEADER = struct("admin command header", 2, { class: [0, "u8"], command: [1, "u8"] });

export const AdminClass = { migration: 64, dirtyPages: 65 } as const;

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

/** Commands of class 65. */
export const DirtyPagesCommand = {
  trackingIdentity: 0,
  startTracking: 1,
  stopTracking: 2,
  pendingMap: 3,
  reportMap: 4,
} as const;
export type DirtyPagesCommandName = keyof typeof DirtyPagesCommand;

/** How pages are marked: by the device in memory that it was given (push), or kept by it until they are asked for (pull). */
export const TrackingMode = { pushBitmap: 1, pushBytemap: 2, pullBitmap: 3, pullBytemap: 4 } as const;
export type TrackingModeName = keyof typeof TrackingMode;
/** What the map of each mode is like, and whether the device is given the memory of it. */
export const TRACKING_KIND: Readonly<Record<TrackingModeName, { readonly form: MapForm; readonly push: boolean }>> = {
  pushBitmap: { form: "bitmap", push: true },
  pushBytemap: { form: "bytemap", push: true },
  pullBitmap: { form: "bitmap", push: false },
  pullBytemap: { form: "bytemap", push: false },
};
/** The best first: without a copy, then without memory that the device has to write. */
export const TRACKING_MODES = ["pushBitmap", "pullBitmap", "pullBytemap", "pushBytemap"] as const;
/** For people. */
export const TRACKING_LABEL = {
  pushBitmap: "push-bitmap",
  pullBitmap: "pull-bitmap",
  pullBytemap: "pull-bytemap",
  pushBytemap: "push-bytemap",
} as const satisfies Record<TrackingModeName, string>;

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

/** Feature bits of a PF that say which modes it has; it does not negotiate them. */
export const TRACKING_FEATURE: Readonly<Record<TrackingModeName, number>> = {
  pushBitmap: 46,
  pushBytemap: 47,
  pullBitmap: 48,
  pullBytemap: 49,
};

/** Pages in one report at most, as powers of two, and pieces of memory of one map at most. */
export const TRACKING_IDENTITY_RESULT = struct("tracking identity result", 8, {
  log2PagesPullBitmap: [0, "u16"],
  log2PagesPullBytemap: [2, "u16"],
  rangesMax: [4, "u32"],
});
/** Head of startTracking. Bytes; the range is guest-physical. In push modes the pieces of the map follow. */
export const START_TRACKING_DATA = struct("start tracking", 24, {
  vdevId: [0, "u16"],
  mode: [2, "u16"],
  pageSize: [4, "u32"],
  rangeAddress: [8, "u64"],
  rangeLength: [16, "u64"],
});
/** A piece of the map to write, in the PF's own address space. Bytes. */
export const TRACKING_MAP_PIECE = struct("piece of a dirty map", 16, { address: [0, "u64"], length: [8, "u32"] });
/** Data of stopTracking and pendingMap: the range is named by the address that it was started with. */
export const TRACKED_RANGE_DATA = struct("tracked range", 16, { vdevId: [0, "u16"], rangeAddress: [8, "u64"] });
/** Bytes of map that can be reported. */
export const PENDING_MAP_RESULT = struct("pending map result", 8, { pending: [0, "u64"] });
/** The result is the map, `length` bytes from `offset`; what was reported is forgotten. */
export const REPORT_MAP_DATA = struct("report map", 32, {
  vdevId: [0, "u16"],
  offset: [8, "u64"],
  length: [16, "u64"],
  rangeAddress: [24, "u64"],
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
