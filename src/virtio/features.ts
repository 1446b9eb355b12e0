/** Device status field (VIRTIO 1.2, 2.1). */
export const Status = {
  acknowledge: 0x01,
  driver: 0x02,
  driverOk: 0x04,
  featuresOk: 0x08,
  needsReset: 0x40,
  failed: 0x80,
} as const;

/** Feature bits that do not belong to a device class: 24 to 49 (VIRTIO 1.2, 2.2 and 6; vhost-user's own). */
export const FeatureBit = {
  notifyOnEmpty: 24,
  anyLayout: 27,
  vhostLogAll: 26,
  ringIndirectDesc: 28,
  ringEventIdx: 29,
  vhostUserProtocolFeatures: 30,
  version1: 32,
  accessPlatform: 33,
  ringPacked: 34,
  inOrder: 35,
  orderPlatform: 36,
  srIov: 37,
  notificationData: 38,
  notifConfigData: 39,
  ringReset: 40,
  adminVq: 41,
} as const;

/** Specification names without prefix, for logs and `vf -i`. */
export const FEATURE_NAMES: Readonly<Record<number, string>> = {
  24: "NOTIFY_ON_EMPTY",
  26: "LOG_ALL",
  27: "ANY_LAYOUT",
  28: "RING_INDIRECT_DESC",
  29: "RING_EVENT_IDX",
  30: "PROTOCOL_FEATURES",
  32: "VERSION_1",
  33: "ACCESS_PLATFORM",
  34: "RING_PACKED",
  35: "IN_ORDER",
  36: "ORDER_PLATFORM",
  37: "SR_IOV",
  38: "NOTIFICATION_DATA",
  39: "NOTIF_CONFIG_DATA",
  40: "RING_RESET",
  41: "ADMIN_VQ",
};

/** A feature word with these bits set. */
export function featureBits(...bits: readonly number[]): bigint {
  return bits.reduce((word, bit) => word | (1n << BigInt(bit)), 0n);
}

export function hasFeature(features: bigint, bit: number): boolean {
  return ((features >> BigInt(bit)) & 1n) === 1n;
}

/**
 * A feature word for people: names where known, bit numbers otherwise.
 * @param classNames of the device class, by bit
 */
export function describeFeatures(features: bigint, classNames: Readonly<Record<number, string>> = {}): string[] {
  const names: string[] = [];
  for (let bit = 0; bit < 64; bit++) {
    if (hasFeature(features, bit)) names.push(classNames[bit] ?? FEATURE_NAMES[bit] ?? `bit ${bit}`);
  }
  return names;
}
