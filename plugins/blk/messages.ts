import type { DeviceClass } from "vfe-vhostd/plugin";

/** None: GET_CONFIG, SET_CONFIG and CONFIG_CHANGE_MSG, which are all that a disk needs, belong to the core. */
export const MESSAGES: NonNullable<DeviceClass["messages"]> = {};
