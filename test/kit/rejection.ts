import { asError } from "../../src/base/errors.ts";

/**
 * The error that a promise ends in, where it has to. In the place of bun:test's "rejects" and "resolves", which run an event loop
 * inside the one that runs: called from a native callback, no further one comes, and what is waited for neither.
 */
export async function rejection(promise: Promise<unknown>): Promise<Error> {
  let value: unknown;
  try {
    value = await promise;
  } catch (error) {
    return asError(error);
  }
  throw new Error(`expected an error, there was ${Bun.inspect(value)}`);
}
