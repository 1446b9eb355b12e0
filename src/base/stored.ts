import type { Static, TSchema } from "typebox";
import { Value } from "typebox/value";
import { VhostdError } from "./errors.ts";

/**
 * Takes plain data of an earlier process for what it should be. Records are not trusted: they may be damaged, or of
 * another version.
 * @param what for the message: "the stored DMA domain"
 * @throws VhostdError invalid
 */
export function parseStored<T extends TSchema>(schema: T, data: unknown, what: string): Static<T> {
  if (Value.Check(schema, data)) return data;
  const [first] = Value.Errors(schema, data);
  throw new VhostdError("invalid", `${what} is not understood: ${first?.instancePath ?? ""} ${first?.message ?? ""}`, {
    fix: "remove the VF and add it again",
  });
}
