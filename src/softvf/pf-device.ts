import { VhostdError } from "../base/errors.ts";
import type { DeviceClass, SoftDevice } from "../plugin.ts";
import { TRACKING_FEATURE } from "../virtio/admin/vendor.ts";
import { configValues } from "../virtio/config-space.ts";
import { FeatureBit, featureBits } from "../virtio/features.ts";
import type { PfSettings } from "./pf-options.ts";

/** Entries of the admin virtqueue: each of 256 VFs can have a command in flight. */
export const PF_RING_SIZE = 2048;
/** That the PF has the vendor's migration commands; no driver negotiates it. */
const MIGRATION_FEATURE = 44;
/** What a class may say: there are no more doorbells. */
const ADMIN_QUEUE_MAX = 1023;

/** Index of the admin virtqueue of a PF that moves its VFs' state, where its class expects it. @throws VhostdError */
export function adminQueueIndex({ name, adminQueue, configSpace }: DeviceClass): number {
  const index = adminQueue?.(configValues(configSpace, new Uint8Array(0)), 0n) ?? 0;
  if (Number.isInteger(index) && index >= 0 && index <= ADMIN_QUEUE_MAX) return index;
  throw new VhostdError(
    "badArguments",
    `class ${name} puts the admin virtqueue at index ${index}, must be from 0 to ${ADMIN_QUEUE_MAX}`,
    { fix: "correct the class, or choose --migration none" },
  );
}

/**
 * The PF as a device: it has an admin virtqueue behind the queues of its class, and nothing else.
 * @param adminQueue its index; undefined for a PF without one
 * @param onReset whoever waits for an answer is gone
 */
export function pfDevice(adminQueue: number | undefined, settings: PfSettings, onReset: () => void): SoftDevice {
  const part =
    adminQueue === undefined
      ? { features: 0n, queues: 0, worker: { name: "none", parameters: {} } }
      : {
          features: featureBits(
            FeatureBit.adminVq,
            MIGRATION_FEATURE,
            ...[...settings.tracking].map((mode) => TRACKING_FEATURE[mode]),
          ),
          queues: adminQueue + 1,
          worker: { name: "forward", parameters: {} },
        };
  return {
    ...part,
    config: () => new Uint8Array(0),
    writeConfig: () => ({}),
    reset: () => {
      onReset();
      return {};
    },
    check: (option, value) => settings.check(option, value),
    set: (option, value) => {
      settings.set(option, value);
      return {};
    },
    [Symbol.dispose]: onReset,
  };
}
