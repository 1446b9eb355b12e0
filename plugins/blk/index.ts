import type { Plugin } from "vfe-vhostd/plugin";
import { CONFIG_SPACE, describe, queues, WRITABLE_CONFIG } from "./config-space.ts";
import { FEATURES } from "./features.ts";
import { MESSAGES } from "./messages.ts";
import { softDevice } from "./soft-device.ts";

/** Block devices (VIRTIO 1.2, 5.2). */
export default {
  name: "blk",
  apiVersion: 1,
  setup(host) {
    host.deviceClass({
      name: "blk",
      virtioId: 2,
      configSpace: CONFIG_SPACE,
      writableConfig: WRITABLE_CONFIG,
      features: FEATURES,
      messages: MESSAGES,
      queues,
      describe,
      adminQueue: () => 0,
      softDevice,
    });
  },
} satisfies Plugin;
