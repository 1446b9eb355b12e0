import Type, { type Static } from "typebox";
import { VhostdError } from "../../base/errors.ts";
import type { Json } from "../../base/json.ts";
import { parseStored } from "../../base/stored.ts";
import type { OwnedFd } from "../../native/fd.ts";

/**
 * Functions and address spaces of kernel VFIO as plain data. Beside a function go its fds by name: "device", and "error" and
 * "request" (our eventfds by which the kernel says that it is lost); beside an address space "container" and "group.N"
 * (number of the IOMMU group), or "iommufd".
 */

export const DEVICE_FD = "device";
export const CONTAINER_FD = "container";
export const IOMMUFD_FD = "iommufd";

export function groupFdName(number: number): string {
  return `group.${number}`;
}

const Bytes = Type.Integer({ minimum: 0, maximum: Number.MAX_SAFE_INTEGER });
const Id = Type.Integer({ minimum: 0, maximum: 0xffff_ffff });
const Span = { offset: Bytes, size: Bytes };

const RegionSchema = Type.Object({ size: Bytes, fileOffset: Bytes, areas: Type.Array(Type.Object(Span)) });

const FunctionSchema = Type.Object({
  canReset: Type.Boolean(),
  /** Somebody else may have its file. */
  lent: Type.Boolean(),
  msix: Type.Array(Type.Object({ bar: Type.Integer({ minimum: 0, maximum: 7 }), ...Span })),
  config: RegionSchema,
  bars: Type.Array(RegionSchema, { minItems: 6, maxItems: 6 }),
  /** All are enabled. */
  vectors: Type.Integer({ minimum: 0, maximum: 2048 }),
});

/** What nobody has, and may be mapped all the same. */
const Left = Type.Array(Type.Object({ iova: Bytes, size: Bytes }));

const SpaceSchema = Type.Union([
  Type.Object({ interface: Type.Literal("group"), groups: Type.Array(Id, { uniqueItems: true }), left: Left }),
  Type.Object({ interface: Type.Literal("iommufd"), ioas: Id, left: Left }),
]);

export type FunctionRecord = Static<typeof FunctionSchema>;
export type SpaceRecord = Static<typeof SpaceSchema>;

/** @throws VhostdError invalid */
export function parseFunctionRecord(data: Json): FunctionRecord {
  return parseStored(FunctionSchema, data, "the stored function");
}

/** @throws VhostdError invalid */
export function parseSpaceRecord(data: Json): SpaceRecord {
  return parseStored(SpaceSchema, data, "the stored address space");
}

/** One of the fds beside a record. @throws VhostdError invalid where it is not there */
export type TakeFd = (name: string) => OwnedFd;

/**
 * The fds beside a record are those that it speaks of.
 * @param whose for the message
 * @throws VhostdError invalid
 */
export function checkFds(
  fds: ReadonlyMap<string, OwnedFd>,
  whose: string,
  required: readonly string[],
  optional: readonly string[] = [],
): TakeFd {
  const take = (name: string) => {
    const fd = fds.get(name);
    if (fd === undefined) throw new VhostdError("invalid", `the record of ${whose} lacks the descriptor ${name}`);
    return fd;
  };
  required.forEach(take);
  const spare = [...fds.keys()].filter((name) => !required.includes(name) && !optional.includes(name));
  if (spare.length > 0) throw new VhostdError("invalid", `the record of ${whose} has spare fds: ${spare.join(", ")}`);
  return take;
}
