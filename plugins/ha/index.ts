import type { Plugin } from "vfe-vhostd/plugin";
import { fallback } from "./fallback.ts";
import { next } from "./order.ts";

/** How a restart of the daemon goes unnoticed. */
export default {
  name: "ha",
  apiVersion: 1,
  setup(host) {
    // Those beside the first have little to wait for: most of it is this process's own work.
    host.adoption({ sideBySide: 4, next, fallback });
  },
} satisfies Plugin;
