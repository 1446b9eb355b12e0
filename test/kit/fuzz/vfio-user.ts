import fc from "fast-check";
import type { FieldType } from "../../../src/base/layout.ts";
import {
  Command,
  DEVICE_INFO,
  DMA_MAP,
  DMA_UNMAP,
  HeaderFlag,
  IRQ_INFO,
  IRQ_SET,
  REGION_ACCESS,
  REGION_INFO,
  REGION_IO_FDS,
  SET_KICK,
  SUB_REGION,
} from "../../../src/vfio-user/messages.ts";
import { encodeVersion } from "../../../src/vfio-user/version.ts";
import { FD_KINDS, type FdKind } from "./vhost-user-message.ts";

/** What a client or a server of vfio-user may say, sane or not. */

/** Offsets, indices, counts, sizes and flags are made of the same numbers, so that some of them fit together. */
const NUMBERS = [0, 1, 2, 3, 4, 5, 7, 8, 9, 16, 20, 24, 32, 36, 64, 255, 256, 0x1000, 0x2000, 0x3000, 0x4000, 0x10000];
const LARGE = [2 ** 20, 2 ** 31, 2 ** 32 - 4096, 2 ** 32 - 1];
const HUGE = [2n ** 32n, 2n ** 46n, 2n ** 53n - 4096n, 2n ** 53n, 2n ** 64n - 4096n, 2n ** 64n - 1n];

const small = fc.oneof(
  { weight: 8, arbitrary: fc.constantFrom(...NUMBERS) },
  { weight: 1, arbitrary: fc.constantFrom(...LARGE) },
);
const number: Readonly<Record<FieldType, fc.Arbitrary<bigint>>> = {
  u8: fc.nat(255).map(BigInt),
  u16: fc.oneof(fc.constantFrom(...NUMBERS.map(BigInt)), fc.nat(0xffff).map(BigInt)),
  u32: small.map(BigInt),
  u48: fc.nat(2 ** 31 - 1).map(BigInt),
  u64: fc.oneof({ weight: 6, arbitrary: small.map(BigInt) }, { weight: 1, arbitrary: fc.constantFrom(...HUGE) }),
  addr: fc.oneof({ weight: 6, arbitrary: small.map(BigInt) }, { weight: 1, arbitrary: fc.constantFrom(...HUGE) }),
};
const BYTES = { u8: 1, u16: 2, u32: 4, u48: 6, u64: 8, addr: 8 } as const;

interface Layout {
  readonly size: number;
  readonly fields: Readonly<Record<string, readonly [offset: number, type: FieldType]>>;
}

/** A structure with any values in its fields; also those that its own encoder would not write. */
function structure({ size, fields }: Layout): fc.Arbitrary<Uint8Array> {
  const entries = Object.values(fields);
  return fc.tuple(...entries.map(([, type]) => number[type])).map((values) => {
    const bytes = new Uint8Array(size);
    for (const [index, [offset, type]] of entries.entries()) {
      for (let i = 0; i < BYTES[type]; i++) bytes[offset + i] = Number((values[index]! >> BigInt(8 * i)) & 0xffn);
    }
    return bytes;
  });
}

const data = fc.oneof(
  { weight: 4, arbitrary: fc.constantFrom(0, 1, 2, 4, 8).map((length) => new Uint8Array(length)) },
  { weight: 2, arbitrary: fc.uint8Array({ maxLength: 64 }) },
  {
    weight: 1,
    arbitrary: fc.array(structure(SUB_REGION), { maxLength: 4 }).map((all) => new Uint8Array(Buffer.concat(all))),
  },
);
const CAPABILITIES = {
  maxMsgFds: 8,
  maxDataTransfer: 1 << 20,
  maxDmaMaps: 16,
  pageSizes: 4096,
  kickFds: 1,
  queueStats: 1,
};
const version = encodeVersion({ major: 0, minor: 1, capabilities: CAPABILITIES });

/** Bodies as they might be meant, and bytes. */
const body: fc.Arbitrary<Uint8Array> = fc.oneof(
  ...[DEVICE_INFO, DMA_MAP, DMA_UNMAP, IRQ_INFO, IRQ_SET, REGION_ACCESS, REGION_INFO, REGION_IO_FDS, SET_KICK].map(
    (layout) => ({
      weight: 4,
      arbitrary: fc.tuple(structure(layout), data).map((parts) => new Uint8Array(Buffer.concat(parts))),
    }),
  ),
  { weight: 2, arbitrary: fc.constant(new Uint8Array(0)) },
  { weight: 2, arbitrary: fc.uint8Array({ maxLength: 80 }) },
  { weight: 1, arbitrary: fc.constant(version) },
);

/** The body that a command has, mostly. */
const BODY_OF: Readonly<Partial<Record<number, Layout>>> = {
  [Command.dmaMap]: DMA_MAP,
  [Command.dmaUnmap]: DMA_UNMAP,
  [Command.getInfo]: DEVICE_INFO,
  [Command.getRegionInfo]: REGION_INFO,
  [Command.getRegionIoFds]: REGION_IO_FDS,
  [Command.getIrqInfo]: IRQ_INFO,
  [Command.setIrqs]: IRQ_SET,
  [Command.regionRead]: REGION_ACCESS,
  [Command.regionWrite]: REGION_ACCESS,
  [Command.setKick]: SET_KICK,
};

const fds = fc.oneof(
  { weight: 5, arbitrary: fc.constant<FdKind[]>([]) },
  { weight: 3, arbitrary: fc.constantFrom<FdKind[]>(["memory"], ["eventfd"], ["eventfd", "eventfd"]) },
  { weight: 2, arbitrary: fc.array(fc.constantFrom(...FD_KINDS), { maxLength: 10 }) },
);

/** One message of a client, as it goes over the wire; `size` is what its header says beyond the truth. */
export interface ClientMessage {
  readonly command: number;
  readonly flags: number;
  readonly size: number;
  readonly body: Uint8Array;
  readonly fds: readonly FdKind[];
}

const command = fc.oneof(
  { weight: 15, arbitrary: fc.constantFrom(...Object.values(Command)) },
  { weight: 1, arbitrary: fc.nat(0xffff) },
);

/** A register or a byte of configuration that is there: what a client does that starts and stops its device. */
const access = fc
  .tuple(
    fc.constantFrom(Command.regionRead, Command.regionWrite),
    fc.constantFrom(4, 4, 4, 1, 7),
    fc.oneof(fc.nat(64), fc.constantFrom(0x1000, 0x2000, 0x3000, 0x4000, 0x5000)),
    fc.constantFrom(1, 2, 4, 8),
    fc.oneof(fc.constantFrom(0, 1, 2, 3, 7, 0xb, 0xf), fc.nat(0xffff_ffff)),
  )
  .map(([which, region, offset, count, value]) => {
    const head = REGION_ACCESS.encode({ offset, region, count });
    const bytes = new Uint8Array(new BigUint64Array([BigInt(value)]).buffer).subarray(0, count);
    const whole = which === Command.regionWrite ? new Uint8Array(Buffer.concat([head, bytes])) : head;
    return { command: which, flags: 0, size: 0, body: whole, fds: [] };
  });

const message: fc.Arbitrary<ClientMessage> = fc.oneof(
  { weight: 3, arbitrary: access },
  {
    weight: 3,
    arbitrary: command.chain((number) => {
      const layout = BODY_OF[number];
      const own =
        layout === undefined
          ? body
          : fc.tuple(structure(layout), data).map((all) => new Uint8Array(Buffer.concat(all)));
      return fc.record({
        command: fc.constant(number),
        flags: fc.oneof(
          { weight: 20, arbitrary: fc.constantFrom<number>(0, 0, HeaderFlag.noReply) },
          { weight: 1, arbitrary: fc.nat(0xff) },
        ),
        size: fc.oneof(
          { weight: 40, arbitrary: fc.constant(0) },
          { weight: 1, arbitrary: fc.constantFrom(-17, -1, 1, 4096, 2 ** 21) },
        ),
        body: fc.oneof({ weight: 6, arbitrary: own }, { weight: 1, arbitrary: body }),
        fds,
      });
    }),
  },
);

/** A client: mostly it begins with the version, as it must. */
export const hostileClient: fc.Arbitrary<ClientMessage[]> = fc
  .tuple(
    fc.oneof({ weight: 9, arbitrary: fc.constant(version) }, { weight: 1, arbitrary: body }),
    fc.array(message, { minLength: 1, maxLength: 60, size: "max" }),
  )
  .map(([first, rest]) => [{ command: Command.version, flags: 0, size: 0, body: first, fds: [] }, ...rest]);

/** How a server treats a command. */
export type Lie =
  | { readonly kind: "usual" }
  | { readonly kind: "errno"; readonly errno: number }
  | { readonly kind: "silent" }
  | { readonly kind: "hangUp" }
  | { readonly kind: "body"; readonly body: Uint8Array; readonly fds: readonly FdKind[] }
  | { readonly kind: "change"; readonly at: number; readonly value: bigint; readonly fds: readonly FdKind[] }
  | { readonly kind: "cut"; readonly length: number }
  | {
      readonly kind: "header";
      readonly header: { readonly id?: number; readonly command?: number; readonly flags?: number };
    }
  | { readonly kind: "raw"; readonly bytes: Uint8Array };

export const lie: fc.Arbitrary<Lie> = fc.oneof(
  { weight: 30, arbitrary: fc.constant({ kind: "usual" as const }) },
  { weight: 2, arbitrary: fc.record({ kind: fc.constant("errno" as const), errno: small }) },
  { weight: 1, arbitrary: fc.constant({ kind: "silent" as const }) },
  { weight: 1, arbitrary: fc.constant({ kind: "hangUp" as const }) },
  { weight: 3, arbitrary: fc.record({ kind: fc.constant("body" as const), body, fds }) },
  {
    weight: 5,
    arbitrary: fc.record({ kind: fc.constant("change" as const), at: fc.nat(40), value: number.u64, fds }),
  },
  { weight: 1, arbitrary: fc.record({ kind: fc.constant("cut" as const), length: fc.nat(40) }) },
  {
    weight: 1,
    arbitrary: fc.record({
      kind: fc.constant("header" as const),
      header: fc.oneof(
        fc.record({ id: fc.nat(0xffff) }),
        fc.record({ command: fc.nat(30) }),
        fc.record({ flags: fc.nat(0xff) }),
      ),
    }),
  },
  {
    weight: 1,
    arbitrary: fc.record({ kind: fc.constant("raw" as const), bytes: fc.uint8Array({ minLength: 1, maxLength: 64 }) }),
  },
);
