import { asError, VhostdError } from "../../base/errors.ts";
import type { Json } from "../../base/json.ts";
import type { OwnedFd } from "../../native/fd.ts";
import { parsePciAddress } from "../../pci/address.ts";
import type { AdoptionTrouble } from "../../plugin.ts";
import { attemptsOf } from "../../vhost-user/session-page.ts";
import { defaultSocket } from "../default-socket.ts";
import { parseVfOptions, parseVfRecord, RECORD_VERSION, type VfRecord } from "../record.ts";
import type { LeftFunction, VfOptions } from "../vf-parts.ts";

/** What an earlier process has written down of a VF. */
export interface StoredVf {
  readonly key: string;
  readonly options: VfOptions;
  readonly record: VfRecord;
  readonly fds: Map<string, OwnedFd>;
}

/** One whose function is in its domain again. */
export interface OpenedVf extends StoredVf {
  readonly left: LeftFunction;
}

/** A record from which a VF cannot go on. */
export class TroubledRecord extends VhostdError {
  constructor(
    readonly options: VfOptions,
    readonly trouble: AdoptionTrouble,
    message: string,
    cause?: unknown,
    /** What its device had not given back, where that is known. */
    readonly rings?: Json,
  ) {
    super("invalid", message, cause === undefined ? {} : { cause });
    this.name = "TroubledRecord";
  }
}

/** @throws TroubledRecord with as much of the options as can be read; VhostdError where the key names no VF */
export function readStoredVf(key: string, value: Json, fds: Map<string, OwnedFd>): StoredVf {
  const options = readOptions(key, value);
  const { version } = members(value);
  if (version !== RECORD_VERSION) {
    const message = `its record has version ${version}, this daemon's are of version ${RECORD_VERSION}`;
    throw new TroubledRecord(options, "other version", message);
  }
  try {
    const record = parseVfRecord(value);
    // What its function was is not known while it is opened again.
    if (record.function === null) {
      throw new TroubledRecord(options, "not open", "its function was not open", undefined, record.rings);
    }
    return { key, options, record, fds };
  } catch (error) {
    if (error instanceof TroubledRecord) throw error;
    throw new TroubledRecord(options, "damaged", asError(error).message, error);
  }
}

/** Guest memory, or memory of its own, was mapped for it. */
export function hasMemory({ session, dataPath }: VfRecord): boolean {
  const { regions } = members(session);
  return (Array.isArray(regions) && regions.length > 0) || members(dataPath).control !== undefined;
}

/** Processes that have not finished anything of its session. Damage is found where the session is taken up. */
export function sessionDeaths(fds: ReadonlyMap<string, OwnedFd>): number {
  const page = fds.get("session:page");
  try {
    return page === undefined ? 0 : attemptsOf(page);
  } catch {
    return 0;
  }
}

function readOptions(key: string, value: Json): VfOptions {
  const address = parsePciAddress(key.slice("vf/".length));
  try {
    return parseVfOptions(members(value).options ?? null);
  } catch (error) {
    const options = { address, socket: defaultSocket(address), mode: "client" } as const;
    throw new TroubledRecord(options, "damaged", asError(error).message, error);
  }
}

/** Of plain data that should be an object. */
export function members(value: Json): Readonly<Record<string, Json>> {
  return typeof value === "object" && value !== null && !Array.isArray(value)
    ? (value as Readonly<Record<string, Json>>)
    : {};
}
