import fc from "fast-check";
import { FLAG_REPLY, PROTOCOL_VERSION, Request } from "../../../src/vhost-user/messages.ts";

/** Single vhost-user messages, and what can be wrong with one. */

/** Kinds of descriptors that come with messages; see FdPool. */
export const FD_KINDS = [
  "memory",
  "eventfd",
  "small memory",
  "read-only memory",
  "cut memory",
  "full eventfd",
  "socket",
  "disk file",
  "directory",
  "null device",
] as const;
export type FdKind = (typeof FD_KINDS)[number];

/** One message as it goes over the wire. `size` is what its header says. */
export interface FuzzedMessage {
  /** For people who read the corpus. */
  readonly name: string;
  readonly request: number;
  readonly flags: number;
  readonly size: number;
  readonly payload: Uint8Array;
  readonly fds: readonly FdKind[];
}

/** Bytes of each file of guest memory, and of each region. */
export const REGION_SIZE = 1 << 20;
/** Where regions begin in the address space that the front-end pretends to have. */
export const USER_BASE = 0x7f00_0000_0000;

const NAMES = new Map<number, string>(Object.entries(Request).map(([name, request]) => [request, name]));

/** A message as a front-end that behaves encodes it. */
export function message(
  request: number,
  payload: Uint8Array = new Uint8Array(),
  fds: readonly FdKind[] = [],
): FuzzedMessage {
  const name = NAMES.get(request) ?? "";
  return { name, request, flags: PROTOCOL_VERSION, size: payload.byteLength, payload, fds };
}

/** Of the same values are made addresses, sizes, indices and flags, so that some of them fit together. */
const NUMBERS = [
  ...[0, 1, 2, 3, 4, 8, 64, 127, 128, 256, 257, 0xfff, 0x1000, 0x2000, 0xffff, 0x10000],
  ...[REGION_SIZE, 2 ** 30],
];
const LARGE = [2 ** 32, USER_BASE, USER_BASE + REGION_SIZE - 16, 2 ** 52, 2 ** 53]
  .map(BigInt)
  .concat([(1n << 63n) - 1n, 1n << 63n, (1n << 64n) - 4096n, (1n << 64n) - 1n]);

/** A word of 64 bits that means something, or two of 32 that do. */
const word: fc.Arbitrary<bigint> = fc.oneof(
  { weight: 6, arbitrary: fc.constantFrom(...NUMBERS.map(BigInt)) },
  { weight: 3, arbitrary: fc.constantFrom(...LARGE) },
  {
    weight: 2,
    arbitrary: fc
      .tuple(fc.constantFrom(...NUMBERS), fc.nat(4))
      .map(([high, low]) => (BigInt(high) << 32n) | BigInt(low)),
  },
);
const wildPayload = fc.oneof(
  {
    weight: 8,
    arbitrary: fc.array(word, { maxLength: 6 }).map((words) => new Uint8Array(BigUint64Array.from(words).buffer)),
  },
  { weight: 1, arbitrary: fc.uint8Array({ maxLength: 400 }) },
);
const fdKind = fc.constantFrom(...FD_KINDS);

export type Mutation = (message: FuzzedMessage) => FuzzedMessage;

function overwrite(payload: Uint8Array, at: number, value: bigint): Uint8Array {
  if (payload.byteLength < 8) return payload;
  const changed = payload.slice();
  new DataView(changed.buffer).setBigUint64(8 * (at % (payload.byteLength >> 3)), value, true);
  return changed;
}

function resized(payload: Uint8Array, by: number): Uint8Array {
  const changed = new Uint8Array(Math.max(0, payload.byteLength + by));
  changed.set(payload.subarray(0, changed.byteLength));
  return changed;
}

/** What a front-end must not do, to one message. */
export const mutation: fc.Arbitrary<Mutation> = fc.oneof(
  {
    weight: 6,
    arbitrary: fc.tuple(fc.nat(40), word).map(
      ([at, value]): Mutation =>
        (given) => ({ ...given, payload: overwrite(given.payload, at, value) }),
    ),
  },
  {
    weight: 3,
    arbitrary: fc.array(fdKind, { maxLength: 3 }).map(
      (fds): Mutation =>
        (given) => ({ ...given, fds }),
    ),
  },
  {
    weight: 1,
    arbitrary: fdKind.map(
      (kind): Mutation =>
        (given) => ({ ...given, fds: Array.from({ length: 9 }, () => kind) }),
    ),
  },
  {
    weight: 2,
    arbitrary: fc.integer({ min: -16, max: 300 }).map(
      (by): Mutation =>
        (given) => {
          const payload = resized(given.payload, by);
          return { ...given, payload, size: payload.byteLength };
        },
    ),
  },
  {
    weight: 1,
    arbitrary: fc.constantFrom(0, 7, 4096, 2 ** 31, 2 ** 32 - 1).map(
      (size): Mutation =>
        (given) => ({ ...given, size }),
    ),
  },
  {
    weight: 2,
    arbitrary: fc.constantFrom(0, 2, 3, FLAG_REPLY | PROTOCOL_VERSION, 0xffff_fff1).map(
      (flags): Mutation =>
        (given) => ({ ...given, flags }),
    ),
  },
  {
    weight: 2,
    arbitrary: fc.nat(60).map(
      (request): Mutation =>
        (given) => ({ ...given, request, name: NAMES.get(request) ?? "" }),
    ),
  },
  {
    weight: 2,
    arbitrary: wildPayload.map(
      (payload): Mutation =>
        (given) => ({ ...given, payload, size: payload.byteLength }),
    ),
  },
);
