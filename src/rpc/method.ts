import { edenGC } from "bun:jsc";
import type { Static, TSchema } from "typebox";
import { Compile, type Validator } from "typebox/compile";
import { asError, sentence, VhostdError } from "../base/errors.ts";
import { findMismatch } from "./mismatch.ts";
import { ProtocolError, RpcCode } from "./protocol.ts";

/** What a handler knows about the one who asks: the same object for all calls of a connection. */
export interface Call {
  /** For the log: "pid 4711 uid 0", or the TCP address. */
  readonly client: string;
  /** Sends a JSON-RPC notification on the caller's connection; a client that does not read them is cut off. */
  notify(method: string, params: unknown): void;
  /** Notes what was asked, with who asked it. */
  log(text: string): void;
  /** Called once when the caller's connection ends. */
  onClose(handler: () => void): void;
}

/** One method. From it come validation, `rpc.discover` and the documentation. */
export interface MethodDefinition<P extends TSchema, R extends TSchema> {
  readonly name: string;
  /** One sentence for people. */
  readonly summary: string;
  /** An object schema: parameters are passed by name. */
  readonly params: P;
  readonly result: R;
  /** May throw VhostdError: its number, reason and fix go to the client. */
  handler(params: Static<P>, call: Call): Static<R> | Promise<Static<R>>;
  /** Whether a call changes something: then it is logged with who made it. */
  readonly changes?: (params: Static<P>) => boolean;
  /** Answers instead of a JSON-RPC error where the parameters do not fit (for clients that look inside `result`). */
  readonly refused?: (error: VhostdError) => Static<R>;
}

/** A method with its types forgotten, as the server keeps it. */
export interface Method {
  readonly name: string;
  readonly summary: string;
  readonly params: TSchema;
  readonly result: TSchema;
  /** @throws ProtocolError invalidParams, or whatever the handler throws */
  invoke(params: unknown, call: Call): Promise<unknown>;
}

/** Characters of a call's parameters in the log. */
const LONGEST_NOTE = 300;

export function defineMethod<P extends TSchema, R extends TSchema>(definition: MethodDefinition<P, R>): Method {
  const { name, summary, params: schema, result, handler, changes, refused } = definition;
  // Compiled with the first call: most processes use few methods, and starting is to be quick.
  let validator: Validator | undefined;
  return {
    name,
    summary,
    params: schema,
    result,
    async invoke(given, call) {
      // Some clients write null or an empty list where there is nothing to say.
      const params = given === undefined || given === null || isEmptyList(given) ? {} : given;
      validator ??= Compile(schema);
      if (validator.Check(params)) {
        if (changes?.(params as Static<P>) !== true) return await handler(params as Static<P>, call);
        call.log(`${name} ${JSON.stringify(params).slice(0, LONGEST_NOTE)}`);
        try {
          return await handler(params as Static<P>, call);
        } catch (error) {
          call.log(`${name} failed: ${sentence(asError(error))}`);
          throw error;
        } finally {
          // About a millisecond. Left to itself the heap would grow to twice its size, and what stays of many changes
          // would lie scattered over it for ever.
          edenGC();
        }
      }
      const { message, path, expected } = explain(name, schema, params);
      if (refused !== undefined) return refused(new VhostdError("badArguments", message));
      throw new ProtocolError(RpcCode.invalidParams, message, { parameter: path, expected });
    },
  };
}

function isEmptyList(value: unknown): boolean {
  return Array.isArray(value) && value.length === 0;
}

function explain(name: string, schema: TSchema, params: unknown) {
  if (typeof params !== "object" || params === null || Array.isArray(params)) {
    return { message: `${name}: parameters are passed by name, in an object`, path: "", expected: "an object" };
  }
  const mismatch = findMismatch(schema, params, "parameter");
  return { path: "", expected: "", ...mismatch, message: `${name}: ${mismatch?.message ?? "parameters do not fit"}` };
}
