import Type from "typebox";
import { VhostdError } from "../base/errors.ts";
import type { Json } from "../base/json.ts";
import { parseStored } from "../base/stored.ts";
import type { OwnedFd } from "../native/fd.ts";
import type { DmaRange, StoredSpace } from "./address-space.ts";
import type { FunctionSnapshot } from "./function.ts";
import { checkIdentity } from "./range-checks.ts";

/**
 * A DMA domain as plain data. Beside it go the files of `mapped` by name, "memory.N" (position in the list), and what keeps
 * its address space, "space.NAME".
 */

/** Of the fds of the address space. */
const SPACE = "space.";

const Bytes = Type.Integer({ minimum: 0, maximum: Number.MAX_SAFE_INTEGER });

const RangeSchema = Type.Object({
  iova: Bytes,
  size: Type.Integer({ minimum: 1, maximum: Number.MAX_SAFE_INTEGER }),
  file: Type.Object({ dev: Bytes, ino: Bytes }),
  offset: Bytes,
});

const DomainSchema = Type.Object({
  mapped: Type.Array(
    Type.Object({
      ...RangeSchema.properties,
      /** What was under way with it: it may be mapped or not. Left out where it is mapped. */
      pending: Type.Optional(Type.Union([Type.Literal("map"), Type.Literal("unmap")])),
    }),
  ),
  claims: Type.Array(Type.Object({ owner: Type.String(), ranges: Type.Array(RangeSchema) })),
  /** The address space, where something is kept of it. */
  space: Type.Optional(Type.Unknown()),
});

/** What owners of a domain claim. */
type Claims = Iterable<readonly [owner: string, ranges: readonly DmaRange[]]>;

/** A range with its file, and what is under way with it. */
export interface RecordedRange<Fd> {
  readonly range: DmaRange;
  readonly fd: Fd;
  readonly pending?: "map" | "unmap" | undefined;
}

/** A domain as it was stored. Each fd belongs to whoever gets this. */
export interface StoredDomain {
  readonly mapped: readonly RecordedRange<OwnedFd>[];
  readonly claims: Claims;
  readonly space: StoredSpace | undefined;
}

/** The fds are borrowed. */
export function domainRecord(
  mapped: readonly RecordedRange<number>[],
  claims: Claims,
  space: FunctionSnapshot | undefined,
): FunctionSnapshot {
  const fds = new Map(mapped.map(({ fd }, i) => [`memory.${i}`, fd]));
  for (const [name, fd] of space?.fds ?? []) fds.set(`${SPACE}${name}`, fd);
  const data = {
    mapped: mapped.map(({ range, pending }) => ({ ...plain(range), ...(pending === undefined ? {} : { pending }) })),
    claims: [...claims].map(([owner, ranges]) => ({ owner, ranges: ranges.map(plain) })),
    ...(space === undefined ? {} : { space: space.data }),
  };
  return { data, fds };
}

/** Takes the fds. @throws VhostdError invalid where they or the data do not fit */
export function readDomainRecord(data: Json, fds: ReadonlyMap<string, OwnedFd>): StoredDomain {
  using undo = new DisposableStack();
  for (const fd of fds.values()) undo.use(fd);
  const record = parseStored(DomainSchema, data, "the stored DMA domain");
  const mapped = record.mapped.map(({ pending, ...range }, i) => {
    const fd = fds.get(`memory.${i}`);
    if (fd === undefined) throw new VhostdError("invalid", `the stored DMA domain lacks the descriptor memory.${i}`);
    // It may have been made shorter since; what is mapped is mapped all the same.
    checkIdentity(range, fd.number);
    return { range, fd, pending };
  });
  const spaceFds = [...fds].filter(([name]) => name.startsWith(SPACE));
  if (fds.size !== mapped.length + spaceFds.length || (record.space === undefined && spaceFds.length > 0)) {
    const what = `${mapped.length} ranges and ${record.space === undefined ? "no" : "an"} address space`;
    throw new VhostdError("invalid", `the stored DMA domain has ${fds.size} fds for ${what}`);
  }
  const kept = new Map(spaceFds.map(([name, fd]) => [name.slice(SPACE.length), fd]));
  undo.move();
  return {
    mapped,
    claims: record.claims.map(({ owner, ranges }) => [owner, ranges] as const),
    space: record.space === undefined ? undefined : { data: record.space as Json, fds: kept },
  };
}

function plain({ iova, size, file, offset }: DmaRange) {
  return { iova, size, file: { dev: file.dev, ino: file.ino }, offset };
}
