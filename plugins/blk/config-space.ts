import type { ConfigTable, ConfigValues } from "vfe-vhostd/plugin";
import { Feature, has } from "./features.ts";

/** struct virtio_blk_config (VIRTIO 1.2, 5.2.4). Sectors are 512 bytes, whatever the block size. */
export const CONFIG_SPACE = {
  capacity: [0, "u64"],
  sizeMax: [8, "u32"],
  segMax: [12, "u32"],
  cylinders: [16, "u16"],
  heads: [18, "u8"],
  sectors: [19, "u8"],
  blkSize: [20, "u32"],
  physicalBlockExp: [24, "u8"],
  alignmentOffset: [25, "u8"],
  minIoSize: [26, "u16"],
  optIoSize: [28, "u32"],
  writeback: [32, "u8"],
  numQueues: [34, "u16"],
  maxDiscardSectors: [36, "u32"],
  maxDiscardSeg: [40, "u32"],
  discardSectorAlignment: [44, "u32"],
  maxWriteZeroesSectors: [48, "u32"],
  maxWriteZeroesSeg: [52, "u32"],
  writeZeroesMayUnmap: [56, "u8"],
  maxSecureEraseSectors: [60, "u32"],
  maxSecureEraseSeg: [64, "u32"],
  secureEraseSectorAlignment: [68, "u32"],
} as const satisfies ConfigTable;

/** The only field that a driver writes: with CONFIG_WCE it turns the write cache on and off (5.2.4.2). */
export const WRITABLE_CONFIG: readonly (keyof typeof CONFIG_SPACE)[] = ["writeback"];

const SECTOR = 512n;

/** Request queues: `num_queues` means something only with MQ. */
export function queues(config: ConfigValues, features: bigint): number {
  return has(features, Feature.mq) ? Math.max(1, Number(config["numQueues"])) : 1;
}

/** What `vf -i` shows. @param features that the function offers */
export function describe(config: ConfigValues, features: bigint): Record<string, string> {
  const bytes = BigInt(config["capacity"] ?? 0) * SECTOR;
  return {
    capacity: `${bytes} (${humanSize(bytes)})`,
    block_size: `${config["blkSize"] || SECTOR}`,
    queues: `${queues(config, features)}`,
    read_only: has(features, Feature.ro) ? "yes" : "no",
  };
}

/** Binary units, one decimal where it tells something: "1.5 GiB". */
function humanSize(bytes: bigint): string {
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB", "ZiB"];
  let unit = 0;
  let value = Number(bytes);
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit++;
  }
  return `${Number(value.toFixed(1))} ${units[unit]}`;
}
