import { type FieldType, fieldSize, struct } from "../base/layout.ts";

/** Registers of a modern virtio PCI device (VIRTIO 1.2, 4.1), shared by driver side and soft device. */

export const VIRTIO_VENDOR = 0x1af4;
/** The PCI device id of a modern device is this much more than its virtio device id (4.1.2). */
export const VIRTIO_DEVICE_BASE = 0x1040;
/** "No vector" in a vector register; what a device answers when it has no more to give (4.1.5.1.2). */
export const NO_VECTOR = 0xffff;

/** PCI configuration space (PCI Local Bus 3.0, 6.1), as far as it is used. */
export const PciConfig = {
  vendor: 0x00,
  device: 0x02,
  command: 0x04,
  status: 0x06,
  capabilities: 0x34,
  /** Bytes of the conventional space; the capability list lies in it. */
  size: 256,
} as const;
export const PciCommand = { memory: 0x2, busMaster: 0x4, intxDisable: 0x400 } as const;
export const PCI_STATUS_CAPABILITIES = 0x10;
export const PciCapability = { vendor: 0x09, msix: 0x11 } as const;

/** struct virtio_pci_cap (4.1.4). */
export const VIRTIO_CAP = struct("virtio_pci_cap", 16, {
  id: [0, "u8"],
  next: [1, "u8"],
  length: [2, "u8"],
  type: [3, "u8"],
  bar: [4, "u8"],
  capId: [5, "u8"],
  offset: [8, "u32"],
  size: [12, "u32"],
});
/** struct virtio_pci_notify_cap (4.1.4.4). */
export const VIRTIO_NOTIFY_CAP = struct("virtio_pci_notify_cap", 20, { ...VIRTIO_CAP.fields, multiplier: [16, "u32"] });
export const VirtioCapType = { common: 1, notify: 2, isr: 3, device: 4, pciAccess: 5, sharedMemory: 8 } as const;

/** ISR status (4.1.4.5), read-to-clear. */
export const Isr = { queue: 0x1, config: 0x2 } as const;

export type Register = readonly [offset: number, type: Exclude<FieldType, "addr">, access: "ro" | "rw"];

/** Bytes of the common configuration with all that this table has. */
export const COMMON_CONFIG_SIZE = 64;

/** Common configuration (4.1.4.3; the last two of VIRTIO 1.3). A driver writes a u64 as two u32, low half first. */
export const COMMON_CONFIG = registerBlock("virtio_pci_common_cfg", COMMON_CONFIG_SIZE, {
  deviceFeatureSelect: [0, "u32", "rw"],
  deviceFeature: [4, "u32", "ro"],
  driverFeatureSelect: [8, "u32", "rw"],
  driverFeature: [12, "u32", "rw"],
  configVector: [16, "u16", "rw"],
  numQueues: [18, "u16", "ro"],
  deviceStatus: [20, "u8", "rw"],
  configGeneration: [21, "u8", "ro"],
  queueSelect: [22, "u16", "rw"],
  queueSize: [24, "u16", "rw"],
  queueVector: [26, "u16", "rw"],
  queueEnable: [28, "u16", "rw"],
  queueNotifyOff: [30, "u16", "ro"],
  queueDesc: [32, "u64", "rw"],
  queueDriver: [40, "u64", "rw"],
  queueDevice: [48, "u64", "rw"],
  queueNotifyData: [56, "u16", "ro"],
  queueReset: [58, "u16", "rw"],
  adminQueueIndex: [60, "u16", "ro"],
  adminQueueNum: [62, "u16", "ro"],
});
/** What every modern device has: up to and without queue_notify_data. Bytes. */
export const COMMON_CONFIG_LEAST = 56;

export type CommonRegister = keyof typeof COMMON_CONFIG;
export type WritableCommonRegister = {
  [K in CommonRegister]: (typeof COMMON_CONFIG)[K][2] extends "rw" ? K : never;
}[CommonRegister];

/** @throws Error at load where registers overlap, lie outside or are not naturally aligned */
function registerBlock<const T extends Readonly<Record<string, Register>>>(name: string, size: number, table: T): T {
  for (const [register, [offset, type]] of Object.entries(table)) {
    if (offset % fieldSize(type) !== 0) throw new Error(`${name}.${register} is not aligned`);
  }
  struct(name, size, Object.fromEntries(Object.entries(table).map(([key, [offset, type]]) => [key, [offset, type]])));
  return table;
}
