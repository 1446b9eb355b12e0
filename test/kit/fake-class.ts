import type { DeviceClass } from "../../src/plugin.ts";

/** A device class that says nothing special, but for these members. */
export function fakeClass(members: Partial<DeviceClass> = {}): DeviceClass {
  return { name: "fake", virtioId: 2, configSpace: {}, features: { names: {} }, queues: () => 2, ...members };
}
