import {
  LOG_DESCRIPTION,
  PRESETUP_BEGIN,
  PRESETUP_END,
  ProtocolFeature,
  Request,
  VRING_STATE,
} from "../../../src/vhost-user/messages.ts";
import type { DirtyLog } from "../../../src/virtio/dirty-log.ts";
import { FeatureBit, featureBits } from "../../../src/virtio/features.ts";
import { type RingSetup, u64, type VhostUserFrontend, withoutFd } from "./frontend.ts";

/** What front-ends say when their VM is migrated. */

const LOG_ALL = featureBits(FeatureBit.vhostLogAll);

/** SET_LOG_BASE. Resolves when it is answered, which it is without being asked to. */
export async function setLogBase(frontend: VhostUserFrontend, { fd, offset, size }: DirtyLog): Promise<void> {
  await frontend.ask(Request.SET_LOG_BASE, LOG_DESCRIPTION.encode({ offset, size }), [fd]);
}

/** As QEMU 7.2 at the begin of a migration: 6; 2 with bit 26 and a reply; 40; 9 with the log flag and a reply for each ring. */
export async function startLogging(frontend: VhostUserFrontend, log: DirtyLog): Promise<void> {
  await setLogBase(frontend, log);
  await frontend.answered(Request.SET_FEATURES, u64(frontend.features | LOG_ALL));
  await askStatus(frontend);
  for (const queue of frontend.queues) {
    await frontend.answered(Request.SET_VRING_ADDR, frontend.ringAddresses(queue, { log: true }));
  }
}

/** As QEMU 7.2 where a migration is cancelled: 2 and 40, 9 for each ring, no replies. */
export async function stopLogging(frontend: VhostUserFrontend): Promise<void> {
  await frontend.send(Request.SET_FEATURES, u64(frontend.features));
  await askStatus(frontend);
  for (const queue of frontend.queues) {
    await frontend.send(Request.SET_VRING_ADDR, frontend.ringAddresses(queue, { log: false }));
  }
}

/** QEMU looks whether FEATURES_OK is there, which it is. */
async function askStatus(frontend: VhostUserFrontend): Promise<void> {
  if (frontend.has(ProtocolFeature.STATUS)) await frontend.askU64(Request.GET_STATUS);
}

export interface EarlySetup {
  /** By index of the ring; 0 unless said. They may be stale when the VM arrives. */
  readonly bases?: readonly number[];
  /** NET_SET_MTU comes first. */
  readonly mtu?: number;
}

const NET_SET_MTU = 20;

/**
 * As NVIDIA's QEMU (stable-8.1-presetup) at the destination, while the VM runs at the source: 41(1), 2, memory, per ring
 * 8 10 9 12 13 without fds, 18 for each, 41(2).
 */
export async function presetup(
  frontend: VhostUserFrontend,
  rings: readonly RingSetup[],
  { bases = [], mtu }: EarlySetup = {},
): Promise<void> {
  await frontend.command(Request.PRESETUP, u64(PRESETUP_BEGIN));
  if (mtu !== undefined) await frontend.command(NET_SET_MTU, u64(BigInt(mtu)));
  await frontend.setFeatures();
  await frontend.handMemory();
  for (const ring of rings) {
    const { index } = ring;
    await frontend.setupRing(ring, bases[index] ?? 0);
    await frontend.command(Request.SET_VRING_KICK, withoutFd(index));
    await frontend.command(Request.SET_VRING_CALL, withoutFd(index));
  }
  for (const { index } of rings) {
    await frontend.command(Request.SET_VRING_ENABLE, VRING_STATE.encode({ index, num: 1 }));
  }
  await frontend.command(Request.PRESETUP, u64(PRESETUP_END));
}
