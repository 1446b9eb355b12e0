import { asError } from "../base/errors.ts";
import type { Logger } from "../base/log.ts";
import type { DeviceClass } from "../plugin.ts";
import { configValues } from "../virtio/config-space.ts";

/**
 * What a class shows of a VF's configuration space. Nothing where it fails: one class that does must not hide the VFs
 * of all others.
 * @param config bytes of the configuration space
 * @param features that the VF offers
 */
export function configColumns(
  deviceClass: DeviceClass,
  config: Uint8Array,
  features: bigint,
  log: Logger,
): Readonly<Record<string, string>> {
  try {
    return deviceClass.describe?.(configValues(deviceClass.configSpace, config), features) ?? {};
  } catch (error) {
    log.debug(`class ${deviceClass.name} does not describe it: ${asError(error).message}`);
    return {};
  }
}
