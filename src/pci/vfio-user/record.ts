import Type from "typebox";
import type { Json } from "../../base/json.ts";
import { parseStored } from "../../base/stored.ts";
import type { ClientSnapshot } from "./client.ts";
import type { IoEventfd, RegionInfo } from "./replies.ts";

/**
 * A function as plain data. Beside it go its fds by name: "socket", "turns" (see VfioUserClient), "region.B" (the file of BAR B), "doorbell.B.N"
 * (descriptor N of BAR B's list of eventfds).
 */

const Bytes = Type.Integer({ minimum: 0, maximum: Number.MAX_SAFE_INTEGER });
const Span = { offset: Bytes, size: Bytes };

const RegionInfoSchema = Type.Object({
  size: Bytes,
  mappable: Type.Union([Type.Null(), Type.Object({ fileOffset: Bytes, areas: Type.Array(Type.Object(Span)) })]),
});

const BarSchema = Type.Object({
  info: RegionInfoSchema,
  eventfds: Type.Array(
    Type.Object({ ...Span, match: Type.Union([Type.Null(), Bytes]), fd: Type.Integer({ minimum: 0, maximum: 252 }) }),
  ),
});

const FunctionSchema = Type.Object({
  client: Type.Object({
    capabilities: Type.Object({
      maxMsgFds: Bytes,
      maxDataTransfer: Type.Integer({ minimum: 8, maximum: Number.MAX_SAFE_INTEGER }),
      maxDmaMaps: Bytes,
      pageSizes: Type.Integer({ minimum: 1, maximum: Number.MAX_SAFE_INTEGER }),
      kickFds: Type.Integer({ minimum: 0, maximum: 1 }),
      queueStats: Type.Integer({ minimum: 0, maximum: 1 }),
    }),
  }),
  configSize: Bytes,
  bars: Type.Array(BarSchema, { minItems: 6, maxItems: 6 }),
  vectors: Type.Integer({ minimum: 0, maximum: 2048 }),
});

export type FunctionRecord = {
  readonly client: ClientSnapshot;
  readonly configSize: number;
  readonly bars: readonly { readonly info: RegionInfo; readonly eventfds: readonly IoEventfd[] }[];
  readonly vectors: number;
};

/** @throws VhostdError invalid */
export function parseFunctionRecord(data: Json): FunctionRecord {
  return parseStored(FunctionSchema, data, "the stored function");
}
