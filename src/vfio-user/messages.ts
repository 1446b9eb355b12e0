import { struct } from "../base/layout.ts";

/**
 * The messages of vfio-user (QEMU docs/interop/vfio-user.rst), shared by client and server. Host byte order, which is
 * little-endian on every machine this runs on.
 */

/** "Commands". Those that only the server sends are here to be refused by name. */
export const Command = {
  version: 1,
  dmaMap: 2,
  dmaUnmap: 3,
  getInfo: 4,
  getRegionInfo: 5,
  getRegionIoFds: 6,
  getIrqInfo: 7,
  setIrqs: 8,
  regionRead: 9,
  regionWrite: 10,
  dmaRead: 11,
  dmaWrite: 12,
  reset: 13,
  regionWriteMulti: 15,
  deviceFeature: 16,
  migrationDataRead: 17,
  migrationDataWrite: 18,
  /** Of this software only, where the server's VERSION says `vfe_kick_fds`; far beyond what the specification numbers. */
  setKick: 0x5601,
  /** Of this software only, where the server's VERSION says `vfe_queue_stats`. */
  queueStats: 0x5602,
} as const;
export type CommandNumber = (typeof Command)[keyof typeof Command];

const COMMAND_NAMES: ReadonlyMap<number, string> = new Map(
  Object.entries(Command).map(([name, number]) => [number, name]),
);

/** For messages to people: "regionRead", or "command 99". */
export function commandName(command: number): string {
  return COMMAND_NAMES.get(command) ?? `command ${command}`;
}

/** "Header". `size` counts the header too. */
export const HEADER = struct("vfio_user_header", 16, {
  id: [0, "u16"],
  command: [2, "u16"],
  size: [4, "u32"],
  flags: [8, "u32"],
  error: [12, "u32"],
});

export const HeaderFlag = {
  /** Bits 0 to 3: 0 is a command, 1 a reply. */
  typeMask: 0xf,
  reply: 0x1,
  noReply: 0x10,
  error: 0x20,
} as const;

/** Payload of VERSION, before the JSON text (see version.ts). */
export const VERSION = struct("vfio_user_version", 4, { major: [0, "u16"], minor: [2, "u16"] });

export const DMA_MAP = struct("vfio_user_dma_map", 32, {
  argsz: [0, "u32"],
  flags: [4, "u32"],
  offset: [8, "addr"],
  address: [16, "addr"],
  size: [24, "addr"],
});
export const DmaFlag = { readable: 0x1, writeable: 0x2 } as const;

/** Request and reply. */
export const DMA_UNMAP = struct("vfio_user_dma_unmap", 24, {
  argsz: [0, "u32"],
  flags: [4, "u32"],
  address: [8, "addr"],
  size: [16, "addr"],
});

/** Request and reply. */
export const DEVICE_INFO = struct("vfio_user_device_info", 16, {
  argsz: [0, "u32"],
  flags: [4, "u32"],
  regions: [8, "u32"],
  irqs: [12, "u32"],
});
export const DeviceFlag = { reset: 0x1, pci: 0x2 } as const;

/** Request and reply; the reply may be followed by capabilities. */
export const REGION_INFO = struct("vfio_region_info", 32, {
  argsz: [0, "u32"],
  flags: [4, "u32"],
  index: [8, "u32"],
  capOffset: [12, "u32"],
  size: [16, "addr"],
  offset: [24, "addr"],
});
export const RegionFlag = { read: 0x1, write: 0x2, mmap: 0x4, caps: 0x8 } as const;

/** Region indices of a PCI device; 0 to 5 are the base address registers. */
export const Region = { rom: 6, config: 7, vga: 8 } as const;

/** One entry of a region's capability list; `next` counts from the start of the region info, 0 ends the list. */
export const REGION_CAP = struct("vfio_info_cap_header", 8, { id: [0, "u16"], version: [2, "u16"], next: [4, "u32"] });
export const REGION_CAP_SPARSE_MMAP = 1;
/** Follows the capability header. */
export const SPARSE_MMAP = struct("vfio_region_info_cap_sparse_mmap", 8, { areas: [0, "u32"], reserved: [4, "u32"] });
export const SPARSE_AREA = struct("vfio_region_sparse_mmap_area", 16, { offset: [0, "addr"], size: [8, "addr"] });

/** Request and reply; the reply is followed by `count` sub-regions. */
export const REGION_IO_FDS = struct("vfio_user_region_io_fds", 16, {
  argsz: [0, "u32"],
  flags: [4, "u32"],
  index: [8, "u32"],
  count: [12, "u32"],
});
export const SUB_REGION = struct("vfio_user_sub_region_ioeventfd", 40, {
  offset: [0, "addr"],
  size: [8, "addr"],
  fdIndex: [16, "u32"],
  type: [20, "u32"],
  flags: [24, "u32"],
  padding: [28, "u32"],
  datamatch: [32, "u64"],
});
export const IoFdType = { ioeventfd: 0, ioregionfd: 1 } as const;
/** KVM_IOEVENTFD_FLAG_DATAMATCH: only writes of this value signal. */
export const IOEVENTFD_DATAMATCH = 0x1;

/** Request and reply. */
export const IRQ_INFO = struct("vfio_irq_info", 16, {
  argsz: [0, "u32"],
  flags: [4, "u32"],
  index: [8, "u32"],
  count: [12, "u32"],
});
export const IrqInfoFlag = { eventfd: 0x1, maskable: 0x2, automasked: 0x4, noResize: 0x8 } as const;
/** Interrupt types of a PCI device. */
export const IrqIndex = { intx: 0, msi: 1, msix: 2, error: 3, request: 4 } as const;

/** Without a reply payload. Eventfds travel beside the message; none with `dataEventfd` de-assigns. */
export const IRQ_SET = struct("vfio_irq_set", 20, {
  argsz: [0, "u32"],
  flags: [4, "u32"],
  index: [8, "u32"],
  start: [12, "u32"],
  count: [16, "u32"],
});
export const IrqSetFlag = {
  dataNone: 0x1,
  dataBool: 0x2,
  dataEventfd: 0x4,
  actionMask: 0x8,
  actionUnmask: 0x10,
  actionTrigger: 0x20,
} as const;

/** REGION_READ and REGION_WRITE, request and reply; `count` bytes follow in a write request and a read reply. */
export const REGION_ACCESS = struct("vfio_user_region_access", 16, {
  offset: [0, "addr"],
  region: [8, "u32"],
  count: [12, "u32"],
});

/**
 * SET_KICK, without a reply payload: the server itself waits on the eventfd beside the message, and each signal is a
 * write to the doorbell at `offset` of `region`; a signal from before counts. It replaces the doorbell's earlier one.
 * Without `connect` there is no eventfd, and the server no longer waits.
 */
export const SET_KICK = struct("vfe_set_kick", 24, {
  argsz: [0, "u32"],
  flags: [4, "u32"],
  region: [8, "u32"],
  reserved: [12, "u32"],
  offset: [16, "addr"],
});
export const SetKickFlag = { connect: 0x1 } as const;

/** Reply to QUEUE_STATS, whose request has no payload; `count` counters follow, by queue. */
export const QUEUE_STATS = struct("vfe_queue_stats", 8, { count: [0, "u32"], reserved: [4, "u32"] });
/** What a queue has done since the function was made; see `QueueStats` of src/pci/function.ts. */
export const QUEUE_COUNTERS = struct("vfe_queue_counters", 32, {
  received: [0, "addr"],
  completed: [8, "addr"],
  bad: [16, "addr"],
  bytes: [24, "addr"],
});
