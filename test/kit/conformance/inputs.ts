import fc from "fast-check";
import type { ConfigTable, ConfigValues, DeviceClass } from "../../../src/plugin.ts";
import { configSize, configValues } from "../../../src/virtio/config-space.ts";

/** All 64 bits, any of them: a device may offer what it likes. */
export const features = fc.bigInt({ min: 0n, max: 2n ** 64n - 1n });

/** Configuration space of a device that implements all of it, or only the beginning. */
function configBytes({ configSpace }: DeviceClass): fc.Arbitrary<Uint8Array> {
  const size = configSize(configSpace);
  const bytes = (length: number) => fc.uint8Array({ minLength: length, maxLength: length });
  return fc.oneof(bytes(size), fc.uint8Array({ maxLength: size }), fc.constant(new Uint8Array(size).fill(0xff)));
}

/** A class reads beyond its own structure. It is no refusal, wherever it comes from. */
export class NoSuchField extends Error {
  constructor(name: string) {
    super(`${name} is read from the configuration space, which has no such field`);
  }
}

/** As a class is given it: by name, to be read only, and with nothing in it that is not in the table. */
export function strictConfig(table: ConfigTable, bytes: Uint8Array): ConfigValues {
  return new Proxy(Object.freeze({ ...configValues(table, bytes) }), {
    get(values, name) {
      if (typeof name === "string" && !Object.hasOwn(values, name)) {
        throw new NoSuchField(name);
      }
      return Reflect.get(values, name);
    },
  });
}

/** A device as its class gets to know it. */
export function device(deviceClass: DeviceClass): fc.Arbitrary<{ config: Uint8Array; features: bigint }> {
  return fc.record({ config: configBytes(deviceClass), features });
}
