import { type Struct, type StructValue, struct } from "../base/layout.ts";

/** The vhost-user protocol as numbers and layouts (QEMU, docs/interop/vhost-user.rst). Little-endian, no padding. */

/** Front-end to back-end requests that the core serves or knows by name. */
export const Request = {
  GET_FEATURES: 1,
  SET_FEATURES: 2,
  SET_OWNER: 3,
  RESET_OWNER: 4,
  SET_MEM_TABLE: 5,
  SET_LOG_BASE: 6,
  SET_LOG_FD: 7,
  SET_VRING_NUM: 8,
  SET_VRING_ADDR: 9,
  SET_VRING_BASE: 10,
  GET_VRING_BASE: 11,
  SET_VRING_KICK: 12,
  SET_VRING_CALL: 13,
  SET_VRING_ERR: 14,
  GET_PROTOCOL_FEATURES: 15,
  SET_PROTOCOL_FEATURES: 16,
  GET_QUEUE_NUM: 17,
  SET_VRING_ENABLE: 18,
  SET_BACKEND_REQ_FD: 21,
  GET_CONFIG: 24,
  SET_CONFIG: 25,
  RESET_DEVICE: 34,
  GET_MAX_MEM_SLOTS: 36,
  ADD_MEM_REG: 37,
  REM_MEM_REG: 38,
  SET_STATUS: 39,
  GET_STATUS: 40,
  /** The standard's GET_SHARED_OBJECT; this where ProtocolFeature.PRESETUP was negotiated. */
  PRESETUP: 41,
} as const;

/** Back-end to front-end requests, on the channel of SET_BACKEND_REQ_FD. */
export const BackendRequest = { CONFIG_CHANGE_MSG: 2, VRING_HOST_NOTIFIER_MSG: 3 } as const;

/** Protocol feature bits. PRESETUP and EXTEND_STATUS are NVIDIA's; the standard has others in their places. */
export const ProtocolFeature = {
  MQ: 0,
  LOG_SHMFD: 1,
  RARP: 2,
  REPLY_ACK: 3,
  MTU: 4,
  BACKEND_REQ: 5,
  CONFIG: 9,
  BACKEND_SEND_FD: 10,
  HOST_NOTIFIER: 11,
  RESET_DEVICE: 13,
  CONFIGURE_MEM_SLOTS: 15,
  STATUS: 16,
  PRESETUP: 18,
  EXTEND_STATUS: 19,
} as const;

/** Names of protocol features for messages to people. */
export function protocolFeatureName(bit: number): string {
  return Object.entries(ProtocolFeature).find(([, value]) => value === bit)?.[0] ?? `bit ${bit}`;
}

/** Header flags: the version, "this is a reply", "send me a reply" (REPLY_ACK). */
export const PROTOCOL_VERSION = 0x1;
export const FLAG_VERSION_MASK = 0x3;
export const FLAG_REPLY = 0x4;
export const FLAG_NEED_REPLY = 0x8;

/** In the payload of SET_VRING_KICK, CALL and ERR: queue index, and "no fd comes with this". */
export const VRING_INDEX_MASK = 0xffn;
export const VRING_NO_FD = 0x100n;

/** Memory regions of one SET_MEM_TABLE, and with that the largest number of fds of a message. */
export const MEM_TABLE_REGIONS_MAX = 8;
/** What GET_MAX_MEM_SLOTS answers: as many as QEMU can use. */
export const MEM_SLOTS = 512;
/** Bytes of configuration space in one GET_CONFIG or SET_CONFIG. */
export const CONFIG_PAYLOAD_MAX = 256;
/** Payload of PRESETUP: what follows sets up a device early, until the second. */
export const PRESETUP_BEGIN = 1n;
export const PRESETUP_END = 2n;
/** SET_STATUS with EXTEND_STATUS, above the device status: only the doorbell of queue 0 is wanted. */
export const STATUS_FIRST_DOORBELL_ONLY = 0x100;
/** SET_CONFIG: what the bytes are for. */
export const CONFIG_FLAG_MIGRATION = 1;

/** Every message begins with it. `size` is that of the payload, bytes. */
export const HEADER = struct("header", 12, { request: [0, "u32"], flags: [4, "u32"], size: [8, "u32"] });

export const U64 = struct("u64", 8, { value: [0, "u64"] });

/** Queue index and a number: entries, base index or 0/1. */
export const VRING_STATE = struct("vring state", 8, { index: [0, "u32"], num: [4, "u32"] });

/** In the flags of SET_VRING_ADDR: writes to the used ring are logged. */
export const VRING_ADDR_LOG = 1;

/** Ring addresses in the front-end's address space, but for `log`: guest-physical, where the used ring is in the log. */
export const VRING_ADDR = struct("vring address", 40, {
  index: [0, "u32"],
  flags: [4, "u32"],
  descriptor: [8, "addr"],
  used: [16, "addr"],
  available: [24, "addr"],
  log: [32, "u64"],
});

/** SET_MEM_TABLE begins with it; `regions` MEMORY_REGION structures follow. */
export const MEM_TABLE = struct("memory table", 8, { regions: [0, "u32"] });

export const MEMORY_REGION = struct("memory region", 32, {
  guestAddress: [0, "addr"],
  size: [8, "addr"],
  userAddress: [16, "addr"],
  fileOffset: [24, "addr"],
});

/** ADD_MEM_REG and REM_MEM_REG: 8 bytes of padding before the region. */
export const SINGLE_REGION_PADDING = 8;
export const SINGLE_REGION_SIZE = SINGLE_REGION_PADDING + MEMORY_REGION.size;

/** SET_LOG_BASE with LOG_SHMFD. */
export const LOG_DESCRIPTION = struct("log description", 16, { size: [0, "addr"], offset: [8, "addr"] });

/** GET_CONFIG and SET_CONFIG begin with it; `size` bytes of configuration space follow. */
export const CONFIG = struct("config", 12, { offset: [0, "u32"], size: [4, "u32"], flags: [8, "u32"] });

/** VRING_HOST_NOTIFIER_MSG: queue index, and the bytes of the fd that hold its doorbell. */
export const VRING_AREA = struct("vring area", 24, { queue: [0, "u64"], size: [8, "addr"], offset: [16, "addr"] });

export type PayloadOf<S> = S extends Struct<infer F> ? StructValue<F> : never;

/** A whole message. */
export function encodeMessage(request: number, flags: number, payload: Uint8Array): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(HEADER.size + payload.byteLength);
  HEADER.write(bytes, { request, flags, size: payload.byteLength });
  bytes.set(payload, HEADER.size);
  return bytes;
}
