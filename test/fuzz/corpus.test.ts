import { expect, test } from "bun:test";
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import fc from "fast-check";
import { addToCorpus, readCorpus } from "../kit/fuzz/corpus.ts";
import { fuzz } from "../kit/fuzz.ts";
import { rejection } from "../kit/rejection.ts";

function scratch() {
  const directory = mkdtempSync(join(tmpdir(), "corpus-"));
  return { directory, [Symbol.dispose]: () => rmSync(directory, { recursive: true }) };
}

test("a failure is made small, kept, and tried first from then on", async () => {
  using corpus = scratch();
  const seen: bigint[] = [];
  const property = (limit: bigint) =>
    fc.asyncProperty(fc.bigInt({ min: 0n, max: 1n << 64n }), async (value) => {
      seen.push(value);
      return value < limit;
    });
  const first = await rejection(fuzz("small numbers", property(1000n), { corpus: corpus.directory }));
  expect(first.message).toMatch(/kept as .*small/);
  const [name] = readdirSync(corpus.directory);
  const kept = JSON.parse(readFileSync(join(corpus.directory, name!), "utf8"));
  expect(kept).toMatchObject({ property: "small numbers", input: [{ $bigint: "0x3e8" }], seed: expect.any(Number) });
  seen.length = 0;
  await rejection(fuzz("small numbers", property(1000n), { corpus: corpus.directory }));
  expect(seen[0]).toBe(1000n);
  expect(readdirSync(corpus.directory)).toEqual([name!]);
  // Of another property nothing is tried.
  seen.length = 0;
  await rejection(fuzz("other", property(1000n), { corpus: corpus.directory }));
  expect(seen[0]).not.toBe(1000n);
});

test("what is kept comes back as it was", async () => {
  using corpus = scratch();
  const anything = fc.anything({
    withBigInt: true,
    withTypedArray: false,
    maxDepth: 3,
    key: fc.oneof(fc.string(), fc.constantFrom("__proto__", "$bigint", "$entries", "$undefined", "constructor")),
    values: [fc.uint8Array(), fc.double(), fc.string(), fc.bigInt(), fc.constant(undefined), fc.boolean()],
  });
  const property = fc.property(anything, (input) => {
    const path = addToCorpus({ property: "p", seed: 1, error: "", input: [input] }, corpus.directory);
    expect(readCorpus("p", corpus.directory)).toEqual([[input]]);
    writeFileSync(path, "{}");
    rmSync(path);
  });
  fc.assert(property, { numRuns: 200 });
});
