import { Deadline } from "../../base/deadline.ts";
import { asError, VhostdError } from "../../base/errors.ts";
import type { DmaDomain } from "../../pci/dma-domain.ts";
import type { DeviceClass } from "../../plugin.ts";
import { configSize, configValues } from "../config-space.ts";
import { FeatureBit, featureBits, hasFeature } from "../features.ts";
import type { VirtioPciDevice } from "../pci-device.ts";
import { ADMIN_MEMORY_OWNER, ADMIN_RING_SIZE, AdminMemory } from "./admin-memory.ts";
import { AdminQueue, type AdminQueuePlace, type AdminQueueTimeouts } from "./admin-queue.ts";
import { AdminRefusal } from "./admin-request.ts";
import { AdminStatus, TRACKING_FEATURE, TRACKING_MODES, type TrackingModeName } from "./vendor.ts";
import { VendorAdmin } from "./vendor-admin.ts";

/** Milliseconds for the PF to let go of a queue that does not work. */
const CLEAN_UP_TIMEOUT = 3_000;
/** What a PF is asked for, and nothing else. */
const PF_FEATURES = featureBits(FeatureBit.version1, FeatureBit.accessPlatform, FeatureBit.adminVq);

export interface AdminTimeouts extends AdminQueueTimeouts {
  /** Milliseconds between two tries of a command; 1 s. */
  readonly retry?: number;
}

/** What a PF can do for its VFs. `none`: they can be used unmanaged. */
export type AdminDiscovery =
  | {
      readonly kind: "vendor";
      readonly admin: VendorAdmin;
      readonly version: string;
      /** How it can mark the pages that its VFs write; it says so, and has not shown it. */
      readonly tracking: readonly TrackingModeName[];
    }
  | { readonly kind: "none"; readonly reason: string };

/**
 * Finds out what a PF can do, and opens its admin queue where it has one. The PF is reset; none of its VFs may be in
 * use. `domain` is the PF's own and must have it attached; nothing is claimed in it where there is no admin queue.
 * @throws VhostdError pfFeatures where it is no modern device; adminQueue where the queue does not work
 */
export async function openAdmin(
  device: VirtioPciDevice,
  domain: DmaDomain,
  deviceClass: Pick<DeviceClass, "configSpace" | "adminQueue">,
  deadline: Deadline,
  timeouts: AdminTimeouts = {},
): Promise<AdminDiscovery> {
  const features = await deadline.race(device.features());
  if (!hasFeature(features, FeatureBit.version1)) {
    throw new VhostdError("pfFeatures", `${device.fn.address} does not offer VERSION_1`, {
      fix: "provision the PF as a modern virtio device",
    });
  }
  if (!hasFeature(features, FeatureBit.adminVq)) return { kind: "none", reason: "the PF does not offer ADMIN_VQ" };
  if (!hasFeature(features, FeatureBit.accessPlatform)) {
    return { kind: "none", reason: "the PF does not offer ACCESS_PLATFORM, which its admin queue needs" };
  }
  try {
    return await openVendorAdmin(device, domain, deviceClass, features, deadline, timeouts);
  } catch (cause) {
    const { address } = device.fn;
    throw new VhostdError("adminQueue", `the admin queue of ${address} does not work: ${asError(cause).message}`, {
      fix: "look at the log of the PF's server or firmware; then add the PF again",
      cause,
    });
  }
}

async function openVendorAdmin(
  device: VirtioPciDevice,
  domain: DmaDomain,
  deviceClass: Pick<DeviceClass, "configSpace" | "adminQueue">,
  features: bigint,
  deadline: Deadline,
  timeouts: AdminTimeouts,
): Promise<AdminDiscovery> {
  await using undo = new AsyncDisposableStack();
  undo.defer(() => domain.releaseAll(ADMIN_MEMORY_OWNER));
  // Before that: the device may know the memory already.
  undo.defer(() => device.reset(Deadline.after(CLEAN_UP_TIMEOUT, "the reset of the PF")).catch(() => {}));
  await device.reset(deadline);
  await deadline.race(device.negotiate(PF_FEATURES));
  const place = await deadline.race(findQueue(device, deviceClass, features));
  const memory = await AdminMemory.claim(domain, place.ringSize);
  const queue = undo.use(await AdminQueue.open(device, place, memory, deadline, timeouts));
  const admin = new VendorAdmin(queue, timeouts.retry);
  try {
    const version = await admin.identity(deadline);
    undo.move();
    return { kind: "vendor", admin, version, tracking: trackingModes(features) };
  } catch (error) {
    const unknown: readonly number[] = [AdminStatus.invalidClass, AdminStatus.invalidCommand];
    if (!(error instanceof AdminRefusal && unknown.includes(error.status))) throw error;
    return { kind: "none", reason: "the admin queue does not speak the vendor's commands" };
  }
}

/** Where the device says it is (valid once ADMIN_VQ is negotiated), or where the class knows it to be. */
async function findQueue(
  device: VirtioPciDevice,
  { configSpace, adminQueue }: Pick<DeviceClass, "configSpace" | "adminQueue">,
  features: bigint,
): Promise<AdminQueuePlace & { readonly ringSize: number }> {
  const [{ index, count }, config, limits] = await Promise.all([
    device.adminQueues(),
    device.readConfig(configSize(configSpace)),
    device.queueLimits(),
  ]);
  const queue = count > 0 ? index : adminQueue?.(configValues(configSpace, config), features);
  if (queue === undefined) throw new VhostdError("adminQueue", "neither the PF nor its device class says which it is");
  const limit = limits[queue];
  const ringSize = Math.min(limit?.sizeMax ?? 0, ADMIN_RING_SIZE.max);
  if (limit === undefined || ringSize < ADMIN_RING_SIZE.min) {
    throw new VhostdError(
      "adminQueue",
      `queue ${queue} of ${limits.length} has room for ${ringSize} descriptors; ${ADMIN_RING_SIZE.min} are needed`,
    );
  }
  return { queue, notifyOff: limit.notifyOff, ringSize };
}

function trackingModes(features: bigint): TrackingModeName[] {
  return TRACKING_MODES.filter((mode) => hasFeature(features, TRACKING_FEATURE[mode]));
}
