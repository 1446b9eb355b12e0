import { VhostdError } from "../base/errors.ts";
import { VERSION } from "./messages.ts";

/** What one side can take ("VFIO_USER_VERSION", capabilities), with the defaults of the specification filled in. */
export type Capabilities = {
  /** Descriptors in one message. */
  readonly maxMsgFds: number;
  /** Bytes of data in one region access. */
  readonly maxDataTransfer: number;
  /** Ranges mapped at a time. */
  readonly maxDmaMaps: number;
  /** Page sizes of DMA mappings, or'ed. */
  readonly pageSizes: number;
  /** 1: SET_KICK, an extension of this software. A server says so only to a client that does. */
  readonly kickFds: number;
  /** 1: QUEUE_STATS, likewise. */
  readonly queueStats: number;
};

export interface Version {
  readonly major: number;
  readonly minor: number;
  readonly capabilities: Capabilities;
}

/** The version this software speaks. */
export const PROTOCOL_VERSION = { major: 0, minor: 1 } as const;

const NAMES = {
  maxMsgFds: { name: "max_msg_fds", standard: 1, least: 1, most: 0xffff_ffff },
  maxDataTransfer: { name: "max_data_xfer_size", standard: 1 << 20, least: 8, most: Number.MAX_SAFE_INTEGER },
  maxDmaMaps: { name: "max_dma_maps", standard: 65535, least: 1, most: Number.MAX_SAFE_INTEGER },
  pageSizes: { name: "pgsizes", standard: 4096, least: 1, most: Number.MAX_SAFE_INTEGER },
  kickFds: { name: "vfe_kick_fds", standard: 0, least: 0, most: 1 },
  queueStats: { name: "vfe_queue_stats", standard: 0, least: 0, most: 1 },
} as const satisfies Record<keyof Capabilities, object>;

/** Of this software only. Some peers warn of a name that they do not know: it is left out where it would say 0. */
const EXTENSIONS: ReadonlySet<string> = new Set<keyof Capabilities>(["kickFds", "queueStats"]);

/** Bytes of a payload: what is longer is not looked at. A peer's capabilities take a few hundred. */
const PAYLOAD_MAX = 4096;

/** Payload of VERSION, request or reply. */
export function encodeVersion({ major, minor, capabilities }: Version): Uint8Array<ArrayBuffer> {
  const named = Object.fromEntries(
    Object.entries(NAMES)
      .map(([key, { name }]) => [key, name, capabilities[key as keyof Capabilities]] as const)
      .filter(([key, , value]) => value !== 0 || !EXTENSIONS.has(key))
      .map(([, name, value]) => [name, value]),
  );
  const text = new TextEncoder().encode(`${JSON.stringify({ capabilities: named })}\0`);
  const payload = new Uint8Array(VERSION.size + text.length);
  VERSION.write(payload, { major, minor });
  payload.set(text, VERSION.size);
  return payload;
}

/**
 * Reads the peer's payload of VERSION.
 * @throws VhostdError protocol where it is malformed, or a capability is not a number within bounds
 */
export function decodeVersion(payload: Uint8Array): Version {
  if (payload.length < VERSION.size) {
    throw new VhostdError("protocol", `vfio-user version has ${payload.length} bytes; at least ${VERSION.size}`);
  }
  if (payload.length > PAYLOAD_MAX) {
    throw new VhostdError("protocol", `vfio-user version has ${payload.length} bytes; at most ${PAYLOAD_MAX}`);
  }
  const { major, minor } = VERSION.read(payload);
  const given = parseCapabilities(payload.subarray(VERSION.size));
  const value = (key: keyof Capabilities): number => {
    const { name, standard, least, most } = NAMES[key];
    const seen = given[name] ?? standard;
    if (typeof seen !== "number" || !Number.isInteger(seen) || seen < least || seen > most) {
      throw new VhostdError("protocol", `vfio-user capability ${name} is ${shown(seen)}; ${least} to ${most}`);
    }
    return seen;
  };
  return {
    major,
    minor,
    capabilities: {
      maxMsgFds: value("maxMsgFds"),
      maxDataTransfer: value("maxDataTransfer"),
      maxDmaMaps: value("maxDmaMaps"),
      pageSizes: value("pageSizes"),
      kickFds: value("kickFds"),
      queueStats: value("queueStats"),
    },
  };
}

function parseCapabilities(bytes: Uint8Array): Readonly<Record<string, unknown>> {
  if (bytes.length === 0) return {};
  const end = bytes.indexOf(0);
  let data: unknown;
  try {
    data = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(end < 0 ? bytes : bytes.subarray(0, end)));
  } catch (cause) {
    throw new VhostdError("protocol", "vfio-user version data is not JSON", { cause });
  }
  if (!isObject(data)) throw new VhostdError("protocol", "vfio-user version data is not a JSON object");
  const { capabilities = {} } = data;
  if (!isObject(capabilities)) throw new VhostdError("protocol", "vfio-user capabilities are not a JSON object");
  return capabilities;
}

/** A peer's value for a message: of anything but a number only the type, it may be endless. */
function shown(value: unknown): string {
  return typeof value === "number" ? String(value) : `of type ${typeof value}`;
}

function isObject(value: unknown): value is Readonly<Record<string, unknown>> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}
