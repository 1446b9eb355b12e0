import fc from "fast-check";
import { signalEventfd } from "../../../src/native/sys.ts";
import { DescriptorFlag } from "../../../src/virtio/split-ring.ts";
import type { RawDescriptor } from "../driver-ring.ts";
import type { NetFrontend } from "./net-frontend.ts";
import { NET_HEADER } from "./net-pair.ts";

/** What the driver of a network device writes into its rings, sane or not. */

/** Entries of a ring. */
export const HOSTILE_RING = 64;

/** An address of a descriptor: in the ring's own buffers, in one of its parts, or anywhere. */
type Place =
  | { readonly of: "buffers" | "desc" | "driver" | "device"; readonly offset: number }
  | { readonly at: number };

type Chain = readonly {
  readonly place: Place;
  readonly length: number;
  readonly flags: number;
  readonly next: number;
}[];

type HostileStep = { readonly queue: 0 | 1 } & (
  | { readonly kind: "chain"; readonly first: number; readonly chain: Chain }
  | { readonly kind: "frame"; readonly first: number; readonly header: NetHeader; readonly size: number }
  | { readonly kind: "head"; readonly head: number }
  | { readonly kind: "index"; readonly index: number }
  | { readonly kind: "kick" }
);
type NetHeader = Parameters<typeof NET_HEADER.encode>[0];

const { write, next, indirect } = DescriptorFlag;
const length = fc.oneof(
  { weight: 5, arbitrary: fc.constantFrom(12, 60, 72, 1514, 1526) },
  { weight: 3, arbitrary: fc.constantFrom(0, 1, 11, 13, 26, 16, 48) },
  { weight: 1, arbitrary: fc.constantFrom(65_535, 65_550, 1 << 20, 2 ** 31, 2 ** 32 - 1) },
);
const place: fc.Arbitrary<Place> = fc.oneof(
  { weight: 8, arbitrary: fc.record({ of: fc.constant("buffers" as const), offset: fc.nat(0xffff) }) },
  {
    weight: 2,
    arbitrary: fc.record({ of: fc.constantFrom("desc", "driver", "device"), offset: fc.nat(16 * HOSTILE_RING) }),
  },
  {
    weight: 1,
    arbitrary: fc.record({ at: fc.oneof(fc.nat(), fc.constantFrom(0, 2 ** 32, 2 ** 32 + (8 << 20) - 1, 2 ** 52)) }),
  },
);
const flags = fc.oneof(
  { weight: 6, arbitrary: fc.constantFrom(0, next, write, next | write) },
  { weight: 2, arbitrary: fc.constantFrom(indirect, indirect | next, indirect | write) },
  { weight: 1, arbitrary: fc.nat(0xffff) },
);
const near = fc.oneof({ weight: 8, arbitrary: fc.nat(HOSTILE_RING - 1) }, { weight: 1, arbitrary: fc.nat(0xffff) });
const header: fc.Arbitrary<NetHeader> = fc.record({
  flags: fc.constantFrom(0, 0, 1, 2, 0xff),
  gsoType: fc.constantFrom(0, 0, 0, 1, 3, 4, 0x80, 0xff),
  headerLength: fc.nat(0xffff),
  gsoSize: fc.nat(0xffff),
  checksumStart: fc.nat(0xffff),
  checksumOffset: fc.nat(0xffff),
  buffers: fc.constantFrom(0, 0, 1, 2, 0xffff),
});

const queue = fc.constantFrom<0 | 1>(0, 1, 1);
const step: fc.Arbitrary<HostileStep> = fc.oneof(
  {
    weight: 6,
    arbitrary: fc.record({
      queue,
      kind: fc.constant("chain" as const),
      first: fc.nat(HOSTILE_RING - 1),
      chain: fc.array(fc.record({ place, length, flags, next: near }), { minLength: 1, maxLength: 6 }),
    }),
  },
  {
    weight: 6,
    arbitrary: fc.record({
      queue: fc.constant<1>(1),
      kind: fc.constant("frame" as const),
      first: fc.nat(HOSTILE_RING - 1),
      header,
      size: fc.oneof(fc.constantFrom(0, 1, 13, 14, 60, 1514, 1515, 9014), fc.nat(70_000)),
    }),
  },
  { weight: 2, arbitrary: fc.record({ queue, kind: fc.constant("head" as const), head: near }) },
  { weight: 1, arbitrary: fc.record({ queue, kind: fc.constant("index" as const), index: fc.nat(0xffff) }) },
  { weight: 6, arbitrary: fc.record({ queue, kind: fc.constant("kick" as const) }) },
);

export const hostileSteps: fc.Arbitrary<HostileStep[]> = fc.array(step, { minLength: 1, maxLength: 60, size: "max" });

/** Does it to the first pair of a front-end whose device runs. */
export function runHostileDriver(
  { queues }: NetFrontend,
  memory: NetFrontend["memory"],
  steps: readonly HostileStep[],
) {
  for (const step of steps) {
    const { kick, driver } = queues[step.queue]!;
    const { ring } = driver;
    const addressOf = (place: Place) => {
      if ("at" in place) return place.at;
      return (place.of === "buffers" ? ring.arena.start : ring[place.of]) + place.offset;
    };
    const put = (index: number, { next, ...descriptor }: RawDescriptor) =>
      ring.writeDescriptor(index % HOSTILE_RING, { ...descriptor, next });
    switch (step.kind) {
      case "chain":
        for (const [at, { place, ...rest }] of step.chain.entries()) {
          put(step.first + at, { ...rest, address: addressOf(place) });
        }
        ring.makeAvailable(step.first);
        break;
      case "frame": {
        memory.write(ring.arena.start, NET_HEADER.encode(step.header));
        const length = NET_HEADER.size + step.size;
        put(step.first, { address: ring.arena.start, length, flags: 0, next: 0 });
        ring.makeAvailable(step.first);
        break;
      }
      case "head":
        ring.makeAvailable(step.head);
        break;
      case "index":
        ring.setAvailableIndex(step.index);
        break;
      case "kick":
        signalEventfd(kick.number);
    }
  }
}
