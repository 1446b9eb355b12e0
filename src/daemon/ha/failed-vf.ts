import Type from "typebox";
import type { Json } from "../../base/json.ts";
import { parseStored } from "../../base/stored.ts";
import type { PciAddress } from "../../pci/address.ts";
import type { Keeper } from "../keeper.ts";
import type { LeftVf } from "../presence.ts";
import { hollowRecord, parseVfOptions, RECORD_VERSION } from "../record.ts";
import { type VfOptions, vfKey } from "../vf-parts.ts";

/** What there is, in the place of its record, of a VF that could not be taken up: it is shown until somebody removes it. */
const Schema = Type.Object({
  version: Type.Literal(RECORD_VERSION),
  options: Type.Unknown(),
  reason: Type.String(),
});

/** The name of its record. */
export function failedKey(address: PciAddress): string {
  return `failed/${address}`;
}

/** Whoever comes after this process knows of it, and nothing holds its function any more. @throws what the keeper does */
export async function keepFailed(keeper: Keeper, { options, failed = "" }: LeftVf): Promise<void> {
  const record = { version: RECORD_VERSION, options: { ...options }, reason: failed };
  await keeper.put(failedKey(options.address), () => ({ record, fds: new Map() }));
  await keeper.delete(vfKey(options.address));
}

/**
 * Without its fds, which hold function and front-end; whoever comes after this process attaches it anew.
 * @throws what the keeper does
 */
export async function keepHollow(keeper: Keeper, options: VfOptions, rings: Json): Promise<void> {
  const record = hollowRecord(options, rings);
  await keeper.put(vfKey(options.address), () => ({ record, fds: new Map() }));
}

/** One that cannot be in service. @throws what the keeper does */
export function keepLeft(keeper: Keeper, left: LeftVf): Promise<void> {
  return left.again === undefined ? keepFailed(keeper, left) : keepHollow(keeper, left.options, left.again);
}

/** As `keepFailed` has stored it. @throws VhostdError invalid */
export function readFailed(value: Json): LeftVf {
  const { options, reason } = parseStored(Schema, value, "the record of a VF that had failed");
  return { options: parseVfOptions(options as Json), failed: reason };
}

/** Nobody is told of it any more. @throws what the keeper does */
export async function forgetFailed(keeper: Keeper, address: PciAddress): Promise<void> {
  // One that could not be attached anew has a record still.
  await Promise.all([failedKey(address), vfKey(address)].map((key) => keeper.delete(key)));
}
