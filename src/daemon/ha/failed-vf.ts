import Type from "typebox";
import type { Json } from "../../base/json.ts";
import { parseStored } from "../../base/stored.ts";
import type { PciAddress } from "../../pci/address.ts";
import type { Keeper } from "../keeper.ts";
import type { LeftVf } from "../presence.ts";
import { parseVfOptions, RECORD_VERSION } from "../record.ts";
import { vfKey } from "../vf-parts.ts";

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
