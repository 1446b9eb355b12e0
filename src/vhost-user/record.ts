import Type from "typebox";
import type { Json } from "../base/json.ts";
import { parseStored } from "../base/stored.ts";

/**
 * A session as plain data. Beside it go its fds by name: "connection", "page", "backend", "region.N" (position in
 * `regions`), "kick.N", "call.N", "err.N" (ring index), "log".
 */

const Word = Type.String({ pattern: "^0x[0-9a-f]{1,16}$" });
const Address = Type.Integer({ minimum: 0, maximum: Number.MAX_SAFE_INTEGER });
const QueueIndex = Type.Integer({ minimum: 0, maximum: 255 });
const QueueIndices = Type.Array(QueueIndex);
const closed = { additionalProperties: false };

const RegionSchema = Type.Object(
  { guestAddress: Address, size: Address, userAddress: Address, fileOffset: Address },
  closed,
);

const RingSchema = Type.Object(
  {
    index: QueueIndex,
    size: Type.Integer({ minimum: 0, maximum: 32768 }),
    base: Type.Integer({ minimum: 0, maximum: 0xffff }),
    started: Type.Boolean(),
    enabled: Type.Boolean(),
    addresses: Type.Optional(Type.Object({ desc: Address, driver: Address, device: Address }, closed)),
  },
  closed,
);

const SessionSchema = Type.Object(
  {
    state: Type.Union([
      Type.Object({ kind: Type.Literal("connected") }, closed),
      Type.Object({ kind: Type.Enum(["negotiated", "preparing", "stopped"]), features: Word }, closed),
      Type.Object(
        { kind: Type.Literal("running"), features: Word, queues: QueueIndices, enabled: QueueIndices },
        closed,
      ),
    ]),
    protocolFeatures: Word,
    status: Type.Integer({ minimum: 0, maximum: 0x1ff }),
    regions: Type.Array(RegionSchema),
    /** The last that were removed one by one: a front-end may say so once more. */
    removed: Type.Array(RegionSchema),
    rings: Type.Array(RingSchema),
    /** Where pages are marked; `lost` says why not all were. */
    log: Type.Optional(Type.Object({ offset: Address, size: Address, lost: Type.Optional(Type.String()) }, closed)),
    /** The function has run while pages were to be marked, and there was no log. */
    unmarked: Type.Optional(Type.Literal(true)),
    /** The function is being started: it may run already. */
    starting: Type.Optional(Type.Literal(true)),
  },
  closed,
);

export type RingRecord = Type.Static<typeof RingSchema>;
export type SessionRecord = Type.Static<typeof SessionSchema>;

/** @throws VhostdError invalid: the record may be of another version, or damaged */
export function parseSessionRecord(data: Json): SessionRecord {
  return parseStored(SessionSchema, data, "the stored session");
}
