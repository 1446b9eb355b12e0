import { Deadline } from "../base/deadline.ts";
import { asError, VhostdError } from "../base/errors.ts";
import type { Struct, StructValue, struct } from "../base/layout.ts";
import type { OwnedFd } from "../native/fd.ts";
import type { ClassMessage, DeviceClass } from "../plugin.ts";
import { configValues } from "../virtio/config-space.ts";
import type { Backend } from "./backend.ts";
import { readConfig, writeConfig } from "./config-requests.ts";
import type { Incoming } from "./connection.ts";
import { setLogBase, setLogFd } from "./log-requests.ts";
import { addRegion, removeRegion, setMemTable } from "./memory-requests.ts";
import {
  CONFIG,
  CONFIG_PAYLOAD_MAX,
  LOG_DESCRIPTION,
  MEM_SLOTS,
  MEM_TABLE,
  MEM_TABLE_REGIONS_MAX,
  MEMORY_REGION,
  PRESETUP_BEGIN,
  PRESETUP_END,
  ProtocolFeature,
  protocolFeatureName,
  Request,
  SINGLE_REGION_SIZE,
  U64,
  VRING_ADDR,
  VRING_INDEX_MASK,
  VRING_STATE,
} from "./messages.ts";
import { MinorRefusal } from "./refusal.ts";
import { setRingAddresses, setRingBase, setRingEnabled, setRingFd, setRingSize } from "./ring-requests.ts";
import type { RingFd } from "./rings.ts";

/** The payload of the answer, or nothing where the message has none of its own. */
export type Answer = Uint8Array | undefined;

type Handled = Promise<Answer> | Promise<void>;

/** One request of the protocol: what it must look like and what it does. */
export interface RequestRow {
  readonly name: string;
  /** Bytes of payload, inclusive. */
  readonly payload: readonly [least: number, most: number];
  /** File descriptors, inclusive. */
  readonly fds: readonly [least: number, most: number];
  /** Protocol feature bit that must have been negotiated. */
  readonly needs: number | undefined;
  /** It may change what must survive the daemon's death: the record is written before the answer. */
  readonly records: boolean;
  /** The fd in whose place it puts another one, where that is all that it changes. */
  replaces?(payload: Uint8Array): ReplacedFd;
  /** `fds` that it takes over it removes from the array. */
  handle(backend: Backend, payload: Uint8Array, fds: OwnedFd[]): Promise<Answer>;
}

export interface ReplacedFd {
  /** Index; there need not be such a ring. */
  readonly ring: number;
  readonly which: RingFd;
}

export type RequestTable = ReadonlyMap<number, RequestRow>;

interface RowOptions {
  readonly fds?: readonly [number, number];
  readonly needs?: number;
  readonly replaces?: RequestRow["replaces"];
}

/** A question: it changes nothing and has an answer of its own. */
function question(name: string, ask: (backend: Backend) => bigint | number, needs?: number): RequestRow {
  return {
    name,
    payload: [0, U64.size],
    fds: [0, 0],
    needs,
    records: false,
    handle: async (backend) => U64.encode({ value: BigInt(ask(backend)) }),
  };
}

function countedQueues({ target, rings }: Backend): number {
  return target.deviceClass.countedQueues?.(rings.length) ?? rings.length;
}

/** A message whose payload is of variable size. */
function raw(
  name: string,
  payload: RequestRow["payload"],
  handle: (backend: Backend, payload: Uint8Array, fds: OwnedFd[]) => Handled,
  { fds = [0, 0], needs, replaces }: RowOptions = {},
): RequestRow {
  return {
    name,
    payload,
    fds,
    needs,
    records: true,
    ...(replaces === undefined ? {} : { replaces }),
    handle: async (backend, bytes, given) => (await handle(backend, bytes, given)) ?? undefined,
  };
}

async function setUpEarly(backend: Backend, { value }: { readonly value: bigint }): Promise<void> {
  const done = value === PRESETUP_BEGIN ? "preparing" : value === PRESETUP_END ? "negotiated" : undefined;
  if (backend.mayRepeat && backend.state.kind === done) return;
  if (value === PRESETUP_BEGIN) await backend.beginPreparing();
  else if (value === PRESETUP_END) await backend.endPreparing();
  else throw new VhostdError("protocol", `early set-up is ${value}, must be ${PRESETUP_BEGIN} or ${PRESETUP_END}`);
}

type Fields = Parameters<typeof struct>[2];

/** A message with a fixed payload. */
function row<const F extends Fields>(
  name: string,
  layout: Struct<F>,
  handle: (backend: Backend, value: StructValue<F>, fds: OwnedFd[]) => Handled,
  options?: RowOptions,
): RequestRow {
  const size = [layout.size, layout.size] as const;
  return raw(name, size, (backend, payload, fds) => handle(backend, layout.read(payload), fds), options);
}

const ONE_FD = { fds: [1, 1] } as const;
const AN_FD_OR_NONE = { fds: [0, 1] } as const;
/** A kick would start its ring. */
const signalOf = (which: Exclude<RingFd, "kick">): RowOptions => ({
  ...AN_FD_OR_NONE,
  replaces: (payload) => ({ ring: Number(U64.read(payload).value & VRING_INDEX_MASK), which }),
});
const MEM_SLOT = { needs: ProtocolFeature.CONFIGURE_MEM_SLOTS } as const;
const CONFIG_SIZES = [CONFIG.size, CONFIG.size + CONFIG_PAYLOAD_MAX] as const;

const CORE: Readonly<Record<number, RequestRow>> = {
  [Request.GET_FEATURES]: question("GET_FEATURES", (backend) => backend.offered),
  [Request.SET_FEATURES]: row("SET_FEATURES", U64, (backend, { value }) => backend.acknowledge(value)),
  [Request.SET_OWNER]: raw("SET_OWNER", [0, U64.size], async ({ target }) => target.standBy()),
  // "No longer used"; back-ends disable the rings at most.
  [Request.RESET_OWNER]: raw("RESET_OWNER", [0, U64.size], async (backend) => {
    for (const ring of backend.rings) await backend.enable(ring, false);
  }),
  [Request.SET_MEM_TABLE]: raw(
    "SET_MEM_TABLE",
    [MEM_TABLE.size, MEM_TABLE.size + MEM_TABLE_REGIONS_MAX * MEMORY_REGION.size],
    setMemTable,
    { fds: [0, MEM_TABLE_REGIONS_MAX] },
  ),
  [Request.SET_LOG_BASE]: raw("SET_LOG_BASE", [U64.size, LOG_DESCRIPTION.size], setLogBase, AN_FD_OR_NONE),
  [Request.SET_LOG_FD]: raw("SET_LOG_FD", [0, U64.size], setLogFd, AN_FD_OR_NONE),
  [Request.SET_VRING_NUM]: row("SET_VRING_NUM", VRING_STATE, setRingSize),
  [Request.SET_VRING_ADDR]: row("SET_VRING_ADDR", VRING_ADDR, setRingAddresses),
  [Request.SET_VRING_BASE]: row("SET_VRING_BASE", VRING_STATE, setRingBase),
  [Request.GET_VRING_BASE]: row("GET_VRING_BASE", VRING_STATE, async (backend, { index }) => {
    const num = await backend.stopRing(backend.ring(index));
    return VRING_STATE.encode({ index, num });
  }),
  [Request.SET_VRING_KICK]: row("SET_VRING_KICK", U64, setRingFd("kick"), AN_FD_OR_NONE),
  [Request.SET_VRING_CALL]: row("SET_VRING_CALL", U64, setRingFd("call"), signalOf("call")),
  [Request.SET_VRING_ERR]: row("SET_VRING_ERR", U64, setRingFd("err"), signalOf("err")),
  [Request.GET_PROTOCOL_FEATURES]: question("GET_PROTOCOL_FEATURES", (backend) => backend.offeredProtocol),
  [Request.SET_PROTOCOL_FEATURES]: row("SET_PROTOCOL_FEATURES", U64, async (backend, { value }) =>
    backend.acknowledgeProtocol(value),
  ),
  [Request.GET_QUEUE_NUM]: question("GET_QUEUE_NUM", countedQueues, ProtocolFeature.MQ),
  [Request.SET_VRING_ENABLE]: row("SET_VRING_ENABLE", VRING_STATE, setRingEnabled),
  [Request.SET_BACKEND_REQ_FD]: raw(
    "SET_BACKEND_REQ_FD",
    [0, U64.size],
    async (backend, _payload, fds) => backend.setBackChannel(fds.shift()!),
    { ...ONE_FD, needs: ProtocolFeature.BACKEND_REQ },
  ),
  [Request.GET_CONFIG]: {
    ...raw("GET_CONFIG", CONFIG_SIZES, readConfig, { needs: ProtocolFeature.CONFIG }),
    records: false,
  },
  [Request.SET_CONFIG]: raw("SET_CONFIG", CONFIG_SIZES, writeConfig, { needs: ProtocolFeature.CONFIG }),
  [Request.RESET_DEVICE]: raw("RESET_DEVICE", [0, U64.size], (backend) => backend.reset(), {
    needs: ProtocolFeature.RESET_DEVICE,
  }),
  [Request.GET_MAX_MEM_SLOTS]: question("GET_MAX_MEM_SLOTS", () => MEM_SLOTS, MEM_SLOT.needs),
  [Request.ADD_MEM_REG]: raw("ADD_MEM_REG", [SINGLE_REGION_SIZE, SINGLE_REGION_SIZE], addRegion, {
    ...ONE_FD,
    ...MEM_SLOT,
  }),
  [Request.REM_MEM_REG]: raw("REM_MEM_REG", [SINGLE_REGION_SIZE, SINGLE_REGION_SIZE], removeRegion, {
    ...AN_FD_OR_NONE,
    ...MEM_SLOT,
  }),
  [Request.SET_STATUS]: row("SET_STATUS", U64, (backend, { value }) => backend.setStatus(Number(value)), {
    needs: ProtocolFeature.STATUS,
  }),
  [Request.GET_STATUS]: question("GET_STATUS", (backend) => backend.status, ProtocolFeature.STATUS),
  [Request.PRESETUP]: row("PRESETUP", U64, setUpEarly, { needs: ProtocolFeature.PRESETUP }),
};

/** Bytes of payload in the answer to a class's message. */
export const CLASS_ANSWER_MAX = 4096;

/** Milliseconds for a class's handler: a front-end is waiting. */
const HANDLER_TIMEOUT = 5_000;

/**
 * The requests of one session: those of the core, and those that the device class adds.
 * @param timeout of a class's handlers, milliseconds
 */
export function requestTable(deviceClass: DeviceClass, timeout = HANDLER_TIMEOUT): RequestTable {
  const table = new Map(Object.entries(CORE).map(([request, entry]) => [Number(request), entry]));
  for (const [request, message] of Object.entries(deviceClass.messages ?? {})) {
    table.set(Number(request), classRow(deviceClass, message, timeout));
  }
  return table;
}

/** A class's message passes the same checks as the core's; what its handler throws is a refusal that ends no session. */
function classRow(deviceClass: DeviceClass, message: ClassMessage, timeout: number): RequestRow {
  return {
    name: message.name,
    payload: [message.size, message.size],
    fds: [message.fds ?? 0, message.fds ?? 0],
    needs: message.needs,
    records: true,
    async handle(backend, payload, fds) {
      const config = configValues(deviceClass.configSpace, await backend.target.readConfig());
      const log = (text: string) => backend.chatter.info(text);
      // Not taken out of the message: they are closed with it.
      const borrowed = fds.map((fd) => fd.number);
      try {
        const handled = message.handle(payload, { config, features: backend.offered, log }, borrowed);
        const answer = await Deadline.after(timeout, `the handler of ${message.name}`).race(handled);
        const size = answer?.byteLength ?? 0;
        if (size > CLASS_ANSWER_MAX) throw new Error(`the answer has ${size} bytes, limit ${CLASS_ANSWER_MAX}`);
        return answer;
      } catch (error) {
        if (error instanceof VhostdError && error.code === "timedOut") throw error;
        throw new MinorRefusal(asError(error).message, { cause: error });
      }
    },
  };
}

/** The row of a request. @throws VhostdError protocol where there is none */
export function rowOf(table: RequestTable, request: number): RequestRow {
  const entry = table.get(request);
  if (entry === undefined) throw new VhostdError("protocol", `request ${request} is not known`);
  return entry;
}

/**
 * The one place where a message is held against its row, in this order: direction, negotiated features, size, fds.
 * @throws VhostdError protocol with the value seen and the limit
 */
export function checkMessage(entry: RequestRow, message: Incoming, backend: Backend): void {
  const refuse = (what: string): never => {
    throw new VhostdError("protocol", `${entry.name} (${message.request}) ${what}`);
  };
  if (message.isReply) refuse("is marked as a reply, requests are not");
  if (entry.needs !== undefined && !backend.has(entry.needs)) {
    refuse(
      `needs protocol feature ${protocolFeatureName(entry.needs)} (${entry.needs}), ` +
        `negotiated are 0x${backend.protocolFeatures.toString(16)}`,
    );
  }
  const [least, most] = entry.payload;
  const size = message.payload.byteLength;
  if (size < least || size > most) refuse(`has ${size} bytes of payload, must be ${range(least, most)}`);
  const [fewest, maximum] = entry.fds;
  const fds = message.fds.length;
  if (fds < fewest || fds > maximum) refuse(`has ${fds} fds, must be ${range(fewest, maximum)}`);
}

function range(least: number, most: number): string {
  return least === most ? `${least}` : `${least} to ${most}`;
}
