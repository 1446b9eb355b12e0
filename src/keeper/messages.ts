import { ERROR_NUMBERS, type ErrorCode, VhostdError } from "../base/errors.ts";
import { struct } from "../base/layout.ts";
import type { Framing } from "../native/message-socket.ts";

/**
 * What the daemon and its keeper say to each other over a unix stream socket: a header, a key, a payload, file descriptors
 * beside them. All is little-endian. The daemon asks, the keeper answers each request once, by its id. Requests and answers
 * that do not fit into a message come in parts, one right after the other.
 */

/** Of this form. A keeper that speaks another one says which. */
export const KEEPER_VERSION = 3;

export const Command = {
  /** Payload: JSON, what the daemon speaks. Answer: JSON, who the keeper is; refused, the connection ends. First, and once. */
  hello: 1,
  /**
   * Key. Payload: places (see encodePlaces), then the record. The fds are those that were not in an earlier one. It takes the
   * place of an earlier one as a whole. Where it is refused (keeperStore), neither is there any more.
   */
  put: 2,
  /** Key. Answer: parts of the record, with the fds; none where there is no such record. */
  get: 3,
  /** Answer: parts of a JSON array of all keys. */
  list: 4,
  /**
   * Key, of a record that need not be there. Answer: nothing, or STILL_CLOSING where a record of this key is not taken before
   * more of the fds of earlier ones are closed.
   */
  delete: 5,
  /** Payload: JSON, [key, index of the fd] of each that is asked for. Answer: a byte for each, Readability. */
  readable: 6,
  /**
   * Key, of a record with a stream socket. Payload: DELIVERY, the bytes of a reply, then what it says is stored first. So many bytes are taken out of the socket and dropped, and the reply is sent on it, as far as it takes it at once.
   * Answer: DELIVERED. Nothing is done for a client that is gone, nor (notFound) where too many fds of this key are still
   * being closed.
   */
  deliver: 7,
} as const;
export type CommandName = keyof typeof Command;

export const HeaderFlag = {
  /** Another part follows, with the same id. */
  more: 1,
  reply: 2,
  /** With reply. Payload: a refusal. */
  error: 4,
} as const;

/** In front of each message. Sizes in bytes; the payload is what of the body follows the key. */
export const HEADER = struct("keeper header", 16, {
  id: [0, "u32"],
  command: [4, "u16"],
  flags: [6, "u16"],
  bodySize: [8, "u32"],
  keySize: [12, "u16"],
});

/** Which of the record's fds, bytes to take, bytes of the reply that follows, and Stores. */
export const DELIVERY = struct("keeper delivery", 16, {
  place: [0, "u32"],
  take: [4, "u32"],
  replySize: [8, "u32"],
  stores: [12, "u32"],
});
/** What is stored beside a delivery: nothing, a record as by `put`, or places and fds of the record that is there. */
export const Stores = { nothing: 0, record: 1, fds: 2 } as const;
/** Bytes that were sent. */
export const DELIVERED = struct("keeper delivered", 4, { sent: [0, "u32"] });

/** The answer to a delete; see there. */
export const STILL_CLOSING: Uint8Array = Uint8Array.of(1);

/** The place of an fd that was not there before. */
export const NEW_FD = 0xffff_ffff;
const WORD = 4;

export const Readability = { no: 0, yes: 1, unknown: 2 } as const;

/** Of one message. The kernel carries at most 253 descriptors. */
const PART_MAX = { payload: 64 << 10, fds: 240 } as const;
/** Bytes of a key. */
const KEY_MAX = 256;

/** Only a part that is full may be followed by another: else a request could have parts without end. */
export function isFull(payload: Uint8Array, fds: number): boolean {
  return payload.length === PART_MAX.payload || fds === PART_MAX.fds;
}

/** A message as it is handled. The fds are owned by whoever handles it. */
export interface KeeperMessage {
  readonly id: number;
  readonly command: number;
  readonly flags: number;
  readonly key: string;
  readonly payload: Uint8Array;
}

export const KEEPER_FRAMING: Framing = {
  headerSize: HEADER.size,
  maxFds: PART_MAX.fds,
  bodySize(header) {
    const { bodySize, keySize } = HEADER.read(header);
    const most = KEY_MAX + PART_MAX.payload;
    if (keySize > KEY_MAX) throw new VhostdError("protocol", `a key has ${keySize} bytes, at most ${KEY_MAX}`);
    if (bodySize > most)
      throw new VhostdError("protocol", `a message has a body of ${bodySize} bytes, at most ${most}`);
    if (bodySize < keySize) throw new VhostdError("protocol", `a body of ${bodySize} bytes has a key of ${keySize}`);
    return bodySize;
  },
};

const encoder = new TextEncoder();
const decoder = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

/** @throws VhostdError invalid where a record cannot have that key */
export function checkKey(key: string): void {
  const size = encoder.encode(key).length;
  if (size <= KEY_MAX && key.isWellFormed()) return;
  throw new VhostdError("invalid", `a key of ${size} bytes; at most ${KEY_MAX}, of well-formed text`);
}

/** A whole message, header and body. */
export function encodeMessage({ id, command, flags, key, payload }: KeeperMessage): Uint8Array<ArrayBuffer> {
  const name = encoder.encode(key);
  const bytes = new Uint8Array(HEADER.size + name.length + payload.length);
  HEADER.write(bytes, { id, command, flags, bodySize: name.length + payload.length, keySize: name.length });
  bytes.set(name, HEADER.size);
  bytes.set(payload, HEADER.size + name.length);
  return bytes;
}

/** @throws VhostdError protocol where the key is no text */
export function decodeMessage(header: Uint8Array, body: Uint8Array): KeeperMessage {
  const { id, command, flags, keySize } = HEADER.read(header);
  try {
    return { id, command, flags, key: decoder.decode(body.subarray(0, keySize)), payload: body.subarray(keySize) };
  } catch (cause) {
    throw new VhostdError("protocol", "a key is no UTF-8", { cause });
  }
}

export function encodeJson(value: unknown): Uint8Array<ArrayBuffer> {
  return encoder.encode(JSON.stringify(value));
}

/** @throws VhostdError protocol where it is none */
export function decodeJson(bytes: Uint8Array, what: string): unknown {
  try {
    return JSON.parse(decoder.decode(bytes));
  } catch (cause) {
    throw new VhostdError("protocol", `${what} is no JSON`, { cause });
  }
}

/** Where each fd of a record was in the earlier one, or NEW_FD. Their count, then as many words. */
export function encodePlaces(places: readonly number[], record: Uint8Array): Uint8Array<ArrayBuffer> {
  const words = Uint32Array.of(places.length, ...places);
  const bytes = new Uint8Array(words.byteLength + record.length);
  bytes.set(new Uint8Array(words.buffer));
  bytes.set(record, words.byteLength);
  return bytes;
}

/** @throws VhostdError protocol where they are not all there */
export function decodePlaces(bytes: Uint8Array): { readonly places: Uint32Array; readonly record: Uint8Array } {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  const count = bytes.length < WORD ? 0 : view.getUint32(0, true);
  const end = (1 + count) * WORD;
  if (end > bytes.length) throw new VhostdError("protocol", `${bytes.length} bytes are not ${count} places`);
  const places = new Uint32Array(view.buffer.slice(view.byteOffset + WORD, view.byteOffset + end));
  return { places, record: bytes.subarray(end) };
}

/** What is taken out of a socket, and how much is sent on it. */
export type Delivery = ReturnType<typeof DELIVERY.read>;

/** @throws VhostdError protocol where not all of it is there */
export function decodeDelivery(bytes: Uint8Array): {
  readonly delivery: Delivery;
  readonly reply: Uint8Array;
  readonly rest: Uint8Array;
} {
  if (bytes.length < DELIVERY.size) throw new VhostdError("protocol", `${bytes.length} bytes are no delivery`);
  const delivery = DELIVERY.read(bytes);
  const end = DELIVERY.size + delivery.replySize;
  if (delivery.stores > Stores.fds) throw new VhostdError("protocol", `a delivery stores ${delivery.stores}`);
  if (end > bytes.length) throw new VhostdError("protocol", `a reply of ${delivery.replySize} bytes is not all there`);
  return { delivery, reply: bytes.subarray(DELIVERY.size, end), rest: bytes.subarray(end) };
}

export function encodeRefusal({ code, number, message, fix }: VhostdError): Uint8Array<ArrayBuffer> {
  return encodeJson({ code, number, message, fix });
}

/** What the other side has refused, as it said it. @throws VhostdError protocol where that makes no sense */
export function decodeRefusal(bytes: Uint8Array): VhostdError {
  const { code, number, message, fix } = (decodeJson(bytes, "a refusal") ?? {}) as Readonly<Record<string, unknown>>;
  if (typeof code !== "string" || typeof number !== "number" || typeof message !== "string") {
    throw new VhostdError("protocol", "a refusal does not say what it is");
  }
  const named = Object.hasOwn(ERROR_NUMBERS, code) ? (code as ErrorCode) : number;
  return new VhostdError(named, message, typeof fix === "string" ? { fix } : {});
}

/** A record and its fds cut into what fits into messages: at least one part. */
export function partsOf<T>(
  payload: Uint8Array,
  fds: readonly T[],
): { readonly payload: Uint8Array; readonly fds: readonly T[]; readonly more: boolean }[] {
  const count = Math.max(1, Math.ceil(payload.length / PART_MAX.payload), Math.ceil(fds.length / PART_MAX.fds));
  return Array.from({ length: count }, (_, part) => ({
    payload: payload.subarray(part * PART_MAX.payload, (part + 1) * PART_MAX.payload),
    fds: fds.slice(part * PART_MAX.fds, (part + 1) * PART_MAX.fds),
    more: part < count - 1,
  }));
}
