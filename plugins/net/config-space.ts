import type { ConfigTable, ConfigValues } from "vfe-vhostd/plugin";
import { Feature, has } from "./features.ts";
import { macText } from "./mac.ts";

/** struct virtio_net_config (VIRTIO 1.2, 5.1.4). */
export const CONFIG_SPACE = {
  mac: [0, "u48"],
  status: [6, "u16"],
  maxVirtqueuePairs: [8, "u16"],
  mtu: [10, "u16"],
  speed: [12, "u32"],
  duplex: [16, "u8"],
  rssMaxKeySize: [17, "u8"],
  rssMaxIndirectionTableLength: [18, "u16"],
  supportedHashTypes: [20, "u32"],
} as const satisfies ConfigTable;

/** Bits of `status`. */
export const Status = { linkUp: 1 } as const;

export const DUPLEXES: readonly string[] = ["half", "full"];

/** Pairs of queues that the device has: receiveq 2k and transmitq 2k + 1 (5.1.2). Without MQ there is one. */
function devicePairs(config: ConfigValues, features: bigint): number {
  return has(features, Feature.mq) ? Math.max(1, Number(config["maxVirtqueuePairs"])) : 1;
}

/** Those that a front-end may use: more than one work only after a command on the device's own control queue. */
function usablePairs(config: ConfigValues, features: bigint): number {
  return has(features, Feature.ctrlVq) ? devicePairs(config, features) : 1;
}

/** Virtqueues towards the guest, whose control queue is its VMM's. */
export function queues(config: ConfigValues, features: bigint): number {
  return 2 * usablePairs(config, features);
}

/** VMMs count pairs. */
export function countedQueues(queues: number): number {
  return queues / 2;
}

export function receives(queue: number): boolean {
  return queue % 2 === 0;
}

/** Behind all pairs that the device has (5.1.2). */
export function controlQueue(config: ConfigValues, features: bigint): number | undefined {
  return has(features, Feature.ctrlVq) ? 2 * devicePairs(config, features) : undefined;
}

/** Where the vendor's PFs have it: they have no control queue, and it follows the pairs. */
export function adminQueue(config: ConfigValues, features: bigint): number {
  return 2 * devicePairs(config, features);
}

/** Up where the device cannot say (5.1.4.2). */
export function linkUp(config: ConfigValues, features: bigint): boolean {
  return !has(features, Feature.status) || (Number(config["status"]) & Status.linkUp) !== 0;
}

/** What a driver has read of a device, and goes by. */
export function comparedConfig(features: bigint): string[] {
  const always = ["mac", "status", "maxVirtqueuePairs", "mtu"] as const satisfies (keyof typeof CONFIG_SPACE)[];
  return has(features, Feature.speedDuplex) ? [...always, "speed", "duplex"] : [...always];
}

/** What `vf -i` shows. @param features that the function offers */
export function describe(config: ConfigValues, features: bigint): Record<string, string> {
  const unknown = "unknown";
  return {
    mac: has(features, Feature.mac) ? macText(BigInt(config["mac"] ?? 0)) : unknown,
    link: has(features, Feature.status) ? (linkUp(config, features) ? "up" : "down") : unknown,
    mtu: has(features, Feature.mtu) ? `${config["mtu"]}` : unknown,
    queue_pairs: describePairs(config, features),
    speed: has(features, Feature.speedDuplex) ? describeSpeed(config) : unknown,
  };
}

function describePairs(config: ConfigValues, features: bigint): string {
  const [usable, all] = [usablePairs(config, features), devicePairs(config, features)];
  return usable === all ? `${all}` : `${usable} (of ${all}: the VF has no control queue)`;
}

/** Values beyond those of the specification say that the device does not know (5.1.4). */
function describeSpeed(config: ConfigValues): string {
  const speed = Number(config["speed"]);
  if (speed > 0x7fff_ffff) return "unknown";
  const duplex = DUPLEXES[Number(config["duplex"])];
  return duplex === undefined ? `${speed} Mb/s` : `${speed} Mb/s, ${duplex} duplex`;
}
