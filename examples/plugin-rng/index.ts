import type { Plugin } from "vfe-vhostd/plugin";
import { softDevice } from "./soft-device.ts";

/** Entropy devices (VIRTIO 1.2, 5.4): one queue, no features, no configuration space. */
export default {
  name: "rng",
  apiVersion: 1,
  setup(host) {
    host.deviceClass({
      name: "rng",
      virtioId: 4,
      configSpace: {},
      features: { names: {} },
      queues: () => 1,
      // Of a PF that does not say where its admin virtqueue is: behind the one queue of the class.
      adminQueue: () => 1,
      softDevice,
    });
  },
} satisfies Plugin;
