/** The environment variable with which `./dev test --long` asks tests for their full counts. */
export const LONG_VARIABLE = "VFE_TEST_LONG";

/** What a test does in full where a run may be long, and otherwise less of the same. */
export function atLength<T>(long: T, short: T): T {
  return process.env[LONG_VARIABLE] === "1" ? long : short;
}
