import type { ClassFeatures } from "vfe-vhostd/plugin";

/** Feature bits of virtio-blk (VIRTIO 1.2, 5.2.3). */
export const Feature = {
  sizeMax: 1,
  segMax: 2,
  geometry: 4,
  ro: 5,
  blkSize: 6,
  flush: 9,
  topology: 10,
  configWce: 11,
  mq: 12,
  discard: 13,
  writeZeroes: 14,
  lifetime: 15,
  secureErase: 16,
} as const;

/** Nothing is added and nothing hidden: what a disk offers is between it and the guest. */
export const FEATURES: ClassFeatures = {
  names: {
    [Feature.sizeMax]: "SIZE_MAX",
    [Feature.segMax]: "SEG_MAX",
    [Feature.geometry]: "GEOMETRY",
    [Feature.ro]: "RO",
    [Feature.blkSize]: "BLK_SIZE",
    [Feature.flush]: "FLUSH",
    [Feature.topology]: "TOPOLOGY",
    [Feature.configWce]: "CONFIG_WCE",
    [Feature.mq]: "MQ",
    [Feature.discard]: "DISCARD",
    [Feature.writeZeroes]: "WRITE_ZEROES",
    [Feature.lifetime]: "LIFETIME",
    [Feature.secureErase]: "SECURE_ERASE",
  },
};

export function has(features: bigint, bit: number): boolean {
  return ((features >> BigInt(bit)) & 1n) === 1n;
}
