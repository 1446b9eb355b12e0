import { Deadline } from "../../../src/base/deadline.ts";
import type { MoverHost } from "../../../src/virtio/mover.ts";
import { VirtioPciDevice } from "../../../src/virtio/pci-device.ts";
import { fakeClass } from "../../kit/fake-class.ts";
import type { FakeFunction } from "../../kit/fake-function.ts";

/** What a data path tells its mover of this function. */
export async function moverHost(fn: FakeFunction, members: Partial<MoverHost> = {}): Promise<MoverHost> {
  const device = await VirtioPciDevice.probe(fn, Deadline.after(1000, "the probe"));
  return {
    device,
    features: await device.features(),
    limits: await device.queueLimits(),
    deviceClass: fakeClass(),
    control: () => undefined,
    ringDoorbell: async (queue) => device.doorbell(queue, queue).ring(queue),
    log: () => {},
    failed: () => {},
    ...members,
  };
}
