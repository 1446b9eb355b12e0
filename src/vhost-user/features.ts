import { VhostdError } from "../base/errors.ts";
import { FeatureBit, featureBits } from "../virtio/features.ts";
import { ProtocolFeature } from "./messages.ts";
import type { SessionTarget } from "./target.ts";

/** Which features pass between front-end and function. A device class cannot forget to mask: this is the only place. */

/** Bits 0 to 23 and 50 to 63 belong to the device class (VIRTIO 1.2, 2.2). */
const CLASS_BITS = 0x00ff_ffffn | (0x3fffn << 50n);

/** Of the bits 24 to 49 a guest is offered these, where the function has them. */
const SHARED_BITS = featureBits(
  FeatureBit.ringIndirectDesc,
  FeatureBit.ringEventIdx,
  FeatureBit.version1,
  FeatureBit.inOrder,
);

/** Bits that are agreed with the front-end and mean nothing to the function. */
const FRONT_END_BITS = featureBits(FeatureBit.vhostLogAll, FeatureBit.vhostUserProtocolFeatures);

/** What GET_FEATURES answers. */
export function offeredFeatures(target: SessionTarget): bigint {
  const { add = [], hide = [] } = target.deviceClass.features;
  const ofClass = (target.deviceFeatures | featureBits(...add)) & CLASS_BITS & ~featureBits(...hide);
  const tracking = target.dirtyTracking ? featureBits(FeatureBit.vhostLogAll) : 0n;
  return ofClass | (target.deviceFeatures & SHARED_BITS) | tracking | featureBits(FeatureBit.vhostUserProtocolFeatures);
}

/** What GET_PROTOCOL_FEATURES answers. */
export function offeredProtocolFeatures(target: SessionTarget): bigint {
  const { MQ, LOG_SHMFD, REPLY_ACK, BACKEND_REQ, CONFIG, BACKEND_SEND_FD, HOST_NOTIFIER } = ProtocolFeature;
  const { RESET_DEVICE, CONFIGURE_MEM_SLOTS, STATUS, PRESETUP, EXTEND_STATUS } = ProtocolFeature;
  return (
    featureBits(MQ, REPLY_ACK, BACKEND_REQ, CONFIG, BACKEND_SEND_FD, RESET_DEVICE, CONFIGURE_MEM_SLOTS, STATUS) |
    featureBits(...(target.deviceClass.protocolFeatures ?? [])) |
    (target.dirtyTracking ? featureBits(LOG_SHMFD) : 0n) |
    (target.presetup ? featureBits(PRESETUP, EXTEND_STATUS) : 0n) |
    (target.doorbellShare === undefined ? 0n : featureBits(HOST_NOTIFIER))
  );
}

/** What of the acknowledged features is acknowledged to the function: nothing that its class adds on its own account. */
export function functionFeatures(acknowledged: bigint, { deviceClass, deviceFeatures }: SessionTarget): bigint {
  return acknowledged & deviceFeatures & ~FRONT_END_BITS & ~featureBits(...(deviceClass.features.add ?? []));
}

/** @throws VhostdError protocol where `acknowledged` holds more than was `offered` */
export function checkOffered(acknowledged: bigint, offered: bigint, what: string): void {
  const extra = acknowledged & ~offered;
  if (extra === 0n) return;
  throw new VhostdError(
    "protocol",
    `${what} 0x${acknowledged.toString(16)} contain 0x${extra.toString(16)}, offered were 0x${offered.toString(16)}`,
  );
}
