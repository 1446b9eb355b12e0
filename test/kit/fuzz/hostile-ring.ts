import fc from "fast-check";
import { DescriptorFlag } from "../../../src/virtio/split-ring.ts";

/** What a driver writes into a ring and does to its device, sane or not. */

/** Guest memory begins there, this many bytes; 64 KiB behind it there is more, which comes and goes. */
export const GUEST_BASE = 0x1_0000_0000;
export const GUEST_SIZE = 1 << 20;
export const EXTRA_BASE = 0x2_0000_0000;
export const EXTRA_SIZE = 1 << 16;
export const RING_PLACES = { desc: GUEST_BASE, driver: GUEST_BASE + 0x2000, device: GUEST_BASE + 0x3000 } as const;
/** Request headers and data. */
const BUFFERS = GUEST_BASE + 0x10000;

export interface HostileDescriptor {
  readonly address: bigint;
  readonly length: number;
  readonly flags: number;
  readonly next: number;
}

/** A descriptor at a place of a table: the ring's own, or one of those that chains may name as indirect. */
export type HostileStep =
  | { readonly kind: "descriptor"; readonly table: number; readonly index: number; readonly value: HostileDescriptor }
  | { readonly kind: "request"; readonly at: number; readonly type: number; readonly sector: bigint }
  | { readonly kind: "offer"; readonly heads: readonly number[] }
  | { readonly kind: "index"; readonly value: number }
  | { readonly kind: "event"; readonly value: number }
  | { readonly kind: "extra"; readonly mapped: boolean }
  | { readonly kind: "cut"; readonly size: number }
  | { readonly kind: "engine"; readonly what: (typeof ENGINE_STEPS)[number] };

const ENGINE_STEPS = [
  ...["kick", "kick", "kick", "park", "quiesce", "unquiesce", "slow", "quick", "out of order", "rings"],
  ...["stop and activate", "call", "no call", "full call"],
] as const;

const TABLES = 3;
/** Where table `number` is; 0 is the ring's. */
export function tablePlace(number: number): number {
  return number === 0 ? RING_PLACES.desc : GUEST_BASE + 0x8000 + number * 0x1000;
}

export function requestPlace(at: number): number {
  return BUFFERS + at * 64;
}

const REQUESTS = 16;
const { next, write, indirect } = DescriptorFlag;

const address = fc.oneof(
  { weight: 6, arbitrary: fc.nat(REQUESTS - 1).map((at) => BigInt(requestPlace(at))) },
  { weight: 4, arbitrary: fc.nat(GUEST_SIZE).map((offset) => BigInt(GUEST_BASE + offset)) },
  { weight: 2, arbitrary: fc.integer({ min: 1, max: TABLES - 1 }).map((number) => BigInt(tablePlace(number))) },
  { weight: 2, arbitrary: fc.nat(EXTRA_SIZE + 4096).map((offset) => BigInt(EXTRA_BASE + offset)) },
  { weight: 1, arbitrary: fc.constantFrom<bigint>(...Object.values(RING_PLACES).map(BigInt)) },
  { weight: 1, arbitrary: fc.bigInt({ min: 0n, max: (1n << 64n) - 1n }) },
  {
    weight: 1,
    arbitrary: fc.constantFrom(0n, (1n << 64n) - 1n, (1n << 64n) - 16n, BigInt(GUEST_BASE + GUEST_SIZE - 1)),
  },
);
const length = fc.oneof(
  { weight: 4, arbitrary: fc.constantFrom(16, 512, 1, 1024, 4096) },
  { weight: 2, arbitrary: fc.constantFrom(0, 15, 17, 32, 48, 256, 16384, 16400) },
  { weight: 1, arbitrary: fc.constantFrom(GUEST_SIZE, 2 ** 31, 2 ** 32 - 1, 2 ** 32 - 16) },
);
const flags = fc.oneof(
  { weight: 6, arbitrary: fc.constantFrom(0, next, write, next | write) },
  { weight: 3, arbitrary: fc.constant(indirect) },
  { weight: 1, arbitrary: fc.nat(0xffff) },
);

/** An index that a ring of this size may have, mostly. */
const within = (size: number) =>
  fc.oneof({ weight: 8, arbitrary: fc.nat(size - 1) }, { weight: 1, arbitrary: fc.nat(0xffff) });

export interface HostileRing {
  readonly size: number;
  readonly first: number;
  readonly indirect: boolean;
  readonly eventIdx: boolean;
  /** Heads that are said to be in flight when the ring is set up again. */
  readonly inFlight: readonly number[];
  readonly steps: readonly HostileStep[];
}

/** A block request that is right, or whose last link goes anywhere: direct, or by an indirect table. */
function chain(size: number): fc.Arbitrary<HostileStep[]> {
  return fc
    .record({
      first: fc.nat(size - 1),
      at: fc.nat(REQUESTS - 1),
      type: fc.constantFrom(0, 1, 4, 8, 11),
      table: fc.nat(TABLES - 1),
      data: fc.constantFrom(512, 1024, 4096, 511),
      link: fc.oneof(
        { weight: 3, arbitrary: fc.constant(undefined) },
        { weight: 1, arbitrary: within(Math.min(size, 3)) },
      ),
    })
    .map(({ first, at, type, table, data, link }) => {
      const start = table === 0 ? first : 0;
      const place = (index: number, value: HostileDescriptor): HostileStep => ({
        kind: "descriptor",
        table,
        index: table === 0 ? index % size : index,
        value,
      });
      const request = BigInt(requestPlace(at));
      const last = { flags: link === undefined ? write : write | next, next: link ?? 0 };
      const intoGuest = type === 1 || type === 11 ? 0 : write;
      const entry = { address: BigInt(tablePlace(table)), length: 48, flags: indirect, next: 0 };
      return [
        { kind: "request", at, type, sector: 0n },
        place(start, { address: request, length: 16, flags: next, next: start + 1 }),
        place(start + 1, { address: request + 64n, length: data, flags: next | intoGuest, next: start + 2 }),
        place(start + 2, { address: request + 32n, length: 1, ...last }),
        ...(table === 0 ? [] : [{ kind: "descriptor", table: 0, index: first, value: entry } as const]),
        { kind: "offer", heads: [first] },
      ];
    });
}

function steps(size: number): fc.Arbitrary<HostileStep[]> {
  const descriptor = fc.record({
    kind: fc.constant("descriptor" as const),
    table: fc.nat(TABLES - 1),
    index: fc.nat(size - 1),
    value: fc.record({ address, length, flags, next: within(size) }),
  });
  const request = fc.record({
    kind: fc.constant("request" as const),
    at: fc.nat(REQUESTS - 1),
    type: fc.oneof(fc.constantFrom(0, 1, 4, 8, 11, 13), fc.nat(0xffff_ffff)),
    sector: fc.oneof(fc.bigInt({ min: 0n, max: 4096n }), fc.bigInt({ min: 0n, max: (1n << 64n) - 1n })),
  });
  const weighted: [number, fc.Arbitrary<HostileStep | HostileStep[]>][] = [
    [15, chain(size)],
    [20, descriptor],
    [8, request],
    [
      10,
      fc.record({ kind: fc.constant("offer" as const), heads: fc.array(within(size), { minLength: 1, maxLength: 8 }) }),
    ],
    [1, fc.record({ kind: fc.constant("index" as const), value: fc.nat(0xffff) })],
    [1, fc.record({ kind: fc.constant("event" as const), value: fc.nat(0xffff) })],
    [1, fc.record({ kind: fc.constant("extra" as const), mapped: fc.boolean() })],
    [1, fc.record({ kind: fc.constant("cut" as const), size: fc.constantFrom(0, 0x1000, 0x2800, 0x9000, GUEST_SIZE) })],
    [10, fc.record({ kind: fc.constant("engine" as const), what: fc.constantFrom(...ENGINE_STEPS) })],
  ];
  const one = fc.oneof(...weighted.map(([weight, arbitrary]) => ({ weight, arbitrary })));
  return fc.array(one, { minLength: 1, maxLength: 60, size: "max" }).map((all) => all.flat());
}

export const hostileRing: fc.Arbitrary<HostileRing> = fc.constantFrom(1, 2, 4, 8, 16, 64, 256).chain((size) =>
  fc.record({
    size: fc.constant(size),
    first: fc.oneof(fc.constantFrom(0, 0xffff, 0xfff0), fc.nat(0xffff)),
    indirect: fc.boolean(),
    eventIdx: fc.boolean(),
    inFlight: fc.array(within(size), { maxLength: 4 }),
    steps: steps(size),
  }),
);
