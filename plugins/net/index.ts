import type { Plugin } from "vfe-vhostd/plugin";
import {
  adminQueue,
  CONFIG_SPACE,
  comparedConfig,
  countedQueues,
  describe,
  linkUp,
  queues,
  receives,
} from "./config-space.ts";
import { CONTROL, stateFields } from "./control.ts";
import { FEATURES } from "./features.ts";
import { MESSAGES, PROTOCOL_FEATURES } from "./messages.ts";
import { softDevice } from "./soft-device.ts";

/** Network devices (VIRTIO 1.2, 5.1). */
export default {
  name: "net",
  apiVersion: 1,
  setup(host) {
    host.deviceClass({
      name: "net",
      virtioId: 1,
      configSpace: CONFIG_SPACE,
      features: FEATURES,
      protocolFeatures: PROTOCOL_FEATURES,
      messages: MESSAGES,
      queues,
      countedQueues,
      receives,
      control: CONTROL,
      describe,
      adminQueue,
      stateFields,
      comparedConfig,
      linkUp,
      softDevice,
    });
  },
} satisfies Plugin;
