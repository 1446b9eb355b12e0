import type { Static, TSchema } from "typebox";
import { Compile, type Validator } from "typebox/compile";
import { VhostdError } from "./errors.ts";

/** Hundreds of records have the same schema, and a daemon that takes them up is in a hurry. */
const validators = new WeakMap<TSchema, Validator>();

/**
 * Takes plain data of an earlier process for what it should be. Records are not trusted: they may be damaged, or of
 * another version.
 * @param what for the message: "the stored DMA domain"
 * @throws VhostdError invalid
 */
export function parseStored<T extends TSchema>(schema: T, data: unknown, what: string): Static<T> {
  const validator = validators.get(schema) ?? Compile(schema);
  validators.set(schema, validator);
  if (validator.Check(data)) return data as Static<T>;
  const [first] = validator.Errors(data);
  throw new VhostdError("invalid", `${what} is not understood: ${first?.instancePath ?? ""} ${first?.message ?? ""}`, {
    fix: "remove the VF and add it again",
  });
}
