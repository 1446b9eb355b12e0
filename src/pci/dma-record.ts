import Type, { type Static } from "typebox";
import type { Json } from "../base/json.ts";
import { parseStored } from "../base/stored.ts";

/** A DMA domain as plain data. Beside it go the files of `mapped` by name: "memory.N" (position in the list). */

const Bytes = Type.Integer({ minimum: 0, maximum: Number.MAX_SAFE_INTEGER });

const RangeSchema = Type.Object({
  iova: Bytes,
  size: Type.Integer({ minimum: 1, maximum: Number.MAX_SAFE_INTEGER }),
  file: Type.Object({ dev: Bytes, ino: Bytes }),
  offset: Bytes,
});

const DomainSchema = Type.Object({
  mapped: Type.Array(RangeSchema),
  claims: Type.Array(Type.Object({ owner: Type.String(), ranges: Type.Array(RangeSchema) })),
});

/** @throws VhostdError invalid */
export function parseDomainRecord(data: Json): Static<typeof DomainSchema> {
  return parseStored(DomainSchema, data, "the stored DMA domain");
}
