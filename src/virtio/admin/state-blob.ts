import { VhostdError } from "../../base/errors.ts";
import { type StructValue, struct } from "../../base/layout.ts";

/**
 * The state of a VF as the vendor's commands carry it: `field_count u32`, then that many `{type u32, size u32, bytes}`,
 * padded with zeroes to whole pages.
 */

export const BLOB_ALIGNMENT = 4096;
/** A blob beyond this is no state of a virtio device: the most queues there can be need a third of it. Bytes. */
export const BLOB_SIZE_MAX = 16 << 20;
/** More fields than the most queues and all else can need. */
export const BLOB_FIELDS_MAX = 8192;

const FIELD = struct("state field", 8, { type: [0, "u32"], size: [4, "u32"] });
const FIELD_COUNT_SIZE = 4;

/** Types of the fields that every class has; 4 to 7 and what else there may be is of the class or the vendor. */
const FieldType = { common: 0, config: 1, queue: 2, indices: 3, inFlight: 8, completed: 9 } as const;

export const COMMON_STATE = struct("common state", 32, {
  deviceFeatureSelect: [0, "u32"],
  deviceFeatures: [4, "u64"],
  driverFeatureSelect: [12, "u32"],
  driverFeatures: [16, "u64"],
  configVector: [24, "u16"],
  numQueues: [26, "u16"],
  queueSelect: [28, "u16"],
  status: [30, "u8"],
  configGeneration: [31, "u8"],
});

export const QUEUE_STATE = struct("queue state", 38, {
  index: [0, "u16"],
  size: [2, "u16"],
  vector: [4, "u16"],
  enable: [6, "u16"],
  notifyOff: [8, "u16"],
  desc: [10, "u64"],
  driver: [18, "u64"],
  device: [26, "u64"],
  notifyData: [34, "u16"],
  reset: [36, "u16"],
});

export const INDICES_STATE = struct("split queue run state", 6, {
  index: [0, "u16"],
  lastAvail: [2, "u16"],
  lastUsed: [4, "u16"],
});

/** Head of a list of descriptors; that many `u16` follow. */
const HEADS = struct("list of descriptors", 4, { queue: [0, "u16"], count: [2, "u16"] });

/** Descriptor heads of one queue. */
export interface QueueHeads {
  readonly queue: number;
  readonly heads: readonly number[];
}

/** A field of the class or of the vendor, as it is. */
export interface OpaqueField {
  readonly type: number;
  readonly bytes: Uint8Array;
}

/** A blob, taken apart. */
export interface VendorState {
  readonly common: StructValue<(typeof COMMON_STATE)["fields"]>;
  /** Device configuration space. */
  readonly config: Uint8Array;
  readonly queues: readonly StructValue<(typeof QUEUE_STATE)["fields"]>[];
  readonly indices: readonly StructValue<(typeof INDICES_STATE)["fields"]>[];
  /** Taken by the device and not completed. */
  readonly inFlight: readonly QueueHeads[];
  /** Completed and not yet in the used ring. */
  readonly completed: readonly QueueHeads[];
  readonly others: readonly OpaqueField[];
}

/** In the order of the vendor's software: common, configuration, class, queue and indices by turns, heads. */
export function encodeState(state: VendorState): Uint8Array<ArrayBuffer> {
  const fields: OpaqueField[] = [
    { type: FieldType.common, bytes: COMMON_STATE.encode(state.common) },
    { type: FieldType.config, bytes: state.config },
    ...state.others,
  ];
  for (const queue of state.queues) {
    fields.push({ type: FieldType.queue, bytes: QUEUE_STATE.encode(queue) });
    const indices = state.indices.find(({ index }) => index === queue.index);
    if (indices !== undefined) fields.push({ type: FieldType.indices, bytes: INDICES_STATE.encode(indices) });
  }
  for (const heads of state.inFlight) fields.push({ type: FieldType.inFlight, bytes: encodeHeads(heads) });
  for (const heads of state.completed) fields.push({ type: FieldType.completed, bytes: encodeHeads(heads) });

  const size = fields.reduce((sum, { bytes }) => sum + FIELD.size + bytes.length, FIELD_COUNT_SIZE);
  const blob = new Uint8Array(Math.ceil(size / BLOB_ALIGNMENT) * BLOB_ALIGNMENT);
  new DataView(blob.buffer).setUint32(0, fields.length, true);
  let at = FIELD_COUNT_SIZE;
  for (const { type, bytes } of fields) {
    FIELD.write(blob, { type, size: bytes.length }, at);
    blob.set(bytes, at + FIELD.size);
    at += FIELD.size + bytes.length;
  }
  return blob;
}

/**
 * Takes a blob apart. The walk is by type and size, so that unknown fields pass; one writer in use counts one field too
 * few, so a last pair of queue and indices is taken where it follows the fields that were counted.
 * @throws VhostdError invalid where a field runs past the blob, is too short for its type, or comes twice
 */
export function decodeState(blob: Uint8Array): VendorState {
  const fields = [...walk(blob)];
  const ofType = (type: number) => fields.filter((field) => field.type === type);
  const [common, second] = ofType(FieldType.common);
  if (common === undefined || second !== undefined) {
    throw malformed(`it has ${second === undefined ? "no" : "more than one"} common configuration`);
  }
  const known: readonly number[] = Object.values(FieldType);
  const state = {
    common: COMMON_STATE.read(sized(common, COMMON_STATE)),
    config: ofType(FieldType.config)[0]?.bytes.slice() ?? new Uint8Array(0),
    queues: ofType(FieldType.queue).map((field) => QUEUE_STATE.read(sized(field, QUEUE_STATE))),
    indices: ofType(FieldType.indices).map((field) => INDICES_STATE.read(sized(field, INDICES_STATE))),
    inFlight: ofType(FieldType.inFlight).map(decodeHeads),
    completed: ofType(FieldType.completed).map(decodeHeads),
    others: fields
      .filter(({ type }) => !known.includes(type))
      .map(({ type, bytes }) => ({ type, bytes: bytes.slice() })),
  };
  checkOnce(
    "queue configuration",
    state.queues.map(({ index }) => index),
  );
  checkOnce(
    "run state",
    state.indices.map(({ index }) => index),
  );
  checkOnce(
    "list of descriptors in flight",
    state.inFlight.map(({ queue }) => queue),
  );
  checkOnce(
    "list of completed descriptors",
    state.completed.map(({ queue }) => queue),
  );
  return state;
}

/** @throws VhostdError invalid */
function* walk(blob: Uint8Array): Generator<OpaqueField> {
  if (blob.length < FIELD_COUNT_SIZE) throw malformed(`it has ${blob.length} bytes`);
  const count = new DataView(blob.buffer, blob.byteOffset, blob.length).getUint32(0, true);
  if (count > BLOB_FIELDS_MAX) throw malformed(`it has ${count} fields, at most ${BLOB_FIELDS_MAX}`);
  let at = FIELD_COUNT_SIZE;
  for (let number = 0; number < count; number++) {
    const field = fieldAt(blob, at);
    if (field === undefined) throw malformed(`field ${number} of ${count} runs past its ${blob.length} bytes`);
    yield field;
    at += FIELD.size + field.bytes.length;
  }
  // The uncounted run state of the last queue. Padding reads as a field of type 0 without content.
  const last = fieldAt(blob, at);
  if (last?.type === FieldType.indices && last.bytes.length === INDICES_STATE.size) yield last;
}

function fieldAt(blob: Uint8Array, at: number): OpaqueField | undefined {
  if (at + FIELD.size > blob.length) return undefined;
  const { type, size } = FIELD.read(blob, at);
  const start = at + FIELD.size;
  return start + size > blob.length ? undefined : { type, bytes: blob.subarray(start, start + size) };
}

/** Longer than its structure is a later version of it. */
function sized(
  { bytes }: Pick<OpaqueField, "bytes">,
  { name, size }: { readonly name: string; readonly size: number },
): Uint8Array {
  if (bytes.length < size) throw malformed(`its ${name} has ${bytes.length} bytes, ${size} are needed`);
  return bytes;
}

function encodeHeads({ queue, heads }: QueueHeads): Uint8Array {
  return new Uint8Array(Uint16Array.of(queue, heads.length, ...heads).buffer);
}

function decodeHeads({ bytes }: OpaqueField): QueueHeads {
  const { queue, count } = HEADS.read(sized({ bytes }, HEADS));
  const end = HEADS.size + 2 * count;
  if (bytes.length < end) throw malformed(`a list of ${count} descriptors has ${bytes.length} bytes`);
  const heads = Array.from(
    { length: count },
    (_, i) => bytes[HEADS.size + 2 * i]! | (bytes[HEADS.size + 2 * i + 1]! << 8),
  );
  return { queue, heads };
}

function checkOnce(what: string, queues: readonly number[]): void {
  const seen = new Set<number>();
  for (const queue of queues) {
    if (seen.has(queue)) throw malformed(`it has more than one ${what} of queue ${queue}`);
    seen.add(queue);
  }
}

function malformed(what: string): VhostdError {
  return new VhostdError("invalid", `the device state is malformed: ${what}`);
}
