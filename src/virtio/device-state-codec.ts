import Type, { type Static } from "typebox";
import { parseStored } from "../base/stored.ts";
import type { DeviceState, QueueState } from "./device-state.ts";
import type { EncodedDeviceState } from "./mover.ts";
import { RING_SIZE_MAX } from "./split-ring.ts";

const U16 = Type.Integer({ minimum: 0, maximum: 0xffff });
const Address = Type.Integer({ minimum: 0, maximum: Number.MAX_SAFE_INTEGER });

/** EncodedDeviceState as it may be found in a record. */
export const DeviceStateSchema = Type.Object({
  features: Type.String({ pattern: "^0x[0-9a-f]{1,16}$" }),
  status: Type.Integer({ minimum: 0, maximum: 0xff }),
  configVector: U16,
  config: Type.String({ pattern: "^[A-Za-z0-9+/]*={0,2}$" }),
  queues: Type.Array(
    Type.Object({
      index: U16,
      size: Type.Integer({ minimum: 1, maximum: RING_SIZE_MAX }),
      vector: U16,
      disabled: Type.Optional(Type.Literal(true)),
      desc: Address,
      driver: Address,
      device: Address,
      lastAvail: U16,
      lastUsed: U16,
      inFlight: Type.Optional(Type.Array(U16, { maxItems: RING_SIZE_MAX })),
    }),
  ),
});

export function encodeDeviceState(state: DeviceState): EncodedDeviceState {
  return {
    features: `0x${state.features.toString(16)}`,
    status: state.status,
    configVector: state.configVector,
    config: state.config.toBase64(),
    queues: state.queues.map(plainQueue),
  };
}

/** @throws VhostdError invalid where a stored state is malformed */
export function decodeDeviceState(stored: unknown): DeviceState {
  const encoded: Static<typeof DeviceStateSchema> = parseStored(DeviceStateSchema, stored, "the stored device state");
  return {
    ...encoded,
    features: BigInt(encoded.features),
    config: Uint8Array.fromBase64(encoded.config),
  };
}

/**
 * Where two states differ, by name and with both values: `["features: 0x1 | 0x3", "queue 1 lastAvail: 4 | 7"]`. Empty
 * where they are equal.
 */
export function compare(a: DeviceState, b: DeviceState): string[] {
  const differences: string[] = [];
  const note = (name: string, left: unknown, right: unknown) => {
    if (left !== right) differences.push(`${name}: ${show(left)} | ${show(right)}`);
  };
  note("features", a.features, b.features);
  note("status", a.status, b.status);
  note("configVector", a.configVector, b.configVector);
  note("config", a.config.toHex(), b.config.toHex());
  const indices = new Set([...a.queues, ...b.queues].map(({ index }) => index));
  for (const index of [...indices].sort((x, y) => x - y)) {
    const left = a.queues.find((queue) => queue.index === index);
    const right = b.queues.find((queue) => queue.index === index);
    if (left === undefined || right === undefined) {
      note(`queue ${index}`, left === undefined ? "absent" : "set up", right === undefined ? "absent" : "set up");
      continue;
    }
    for (const field of QUEUE_FIELDS) note(`queue ${index} ${field}`, left[field], right[field]);
    note(`queue ${index} inFlight`, showHeads(left), showHeads(right));
  }
  return differences;
}

/** Both are the same but for where the rings are and for the configuration space. */
export function isSameSetUp(a: DeviceState, b: DeviceState): boolean {
  const setUp = (state: DeviceState): DeviceState => ({
    ...state,
    config: new Uint8Array(0),
    queues: state.queues.map(({ inFlight: _, ...queue }) => ({ ...queue, lastAvail: 0, lastUsed: 0 })),
  });
  return compare(setUp(a), setUp(b)).length === 0;
}

const QUEUE_FIELDS = [
  "size",
  "vector",
  "disabled",
  "desc",
  "driver",
  "device",
  "lastAvail",
  "lastUsed",
] as const satisfies readonly (keyof QueueState)[];

function plainQueue(queue: QueueState): QueueState {
  const { index, size, vector, disabled, desc, driver, device, lastAvail, lastUsed, inFlight } = queue;
  const ring = { index, size, vector, desc, driver, device, lastAvail, lastUsed };
  const plain = disabled === undefined ? ring : { ...ring, disabled };
  return inFlight === undefined ? plain : { ...plain, inFlight: [...inFlight] };
}

/** The order in which a device lists its heads means nothing. */
function showHeads({ inFlight = [] }: QueueState): string {
  return [...inFlight].sort((a, b) => a - b).join(" ") || "none";
}

function show(value: unknown): string {
  return typeof value === "bigint" ? `0x${value.toString(16)}` : String(value);
}
