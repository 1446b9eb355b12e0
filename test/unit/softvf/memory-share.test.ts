import { expect, test } from "bun:test";
import { MEMORY_LIMITS, MemoryShare } from "../../../src/softvf/memory-share.ts";

const GIB = 2 ** 30;
const TIB = 2 ** 40;

/** As many functions, disposed of with the stack. */
function shares(count: number) {
  const stack = new DisposableStack();
  const all = Array.from({ length: count }, () => stack.use(new MemoryShare()));
  return { all, [Symbol.dispose]: () => stack.dispose() };
}

test("a function alone has the most, many share what there is, each has enough for a guest", () => {
  using one = shares(1);
  expect(one.all[0]!.limits.bytes).toBe(MEMORY_LIMITS.bytes);
  using some = shares(255);
  expect(some.all[0]!.limits.bytes).toBe(TIB / 4);
  expect(some.all[0]!.limits.ranges * 256).toBeLessThanOrEqual(Math.max(256 * 64, 2 ** 31));
  using many = shares(5000);
  expect(many.all[0]!.limits).toEqual({ bytes: 64 * GIB, ranges: 64 });
});

test("what is over a limit is refused, and there again when something was given back", () => {
  using two = shares(2);
  const [share, other] = two.all;
  share!.take(3 * TIB);
  share!.take(TIB);
  expect(() => share!.take(4096)).toThrow(
    "4398046515200 bytes of memory of this function; at most 4398046511104: ENOSPC",
  );
  other!.take(4 * TIB);
  share!.give(TIB);
  share!.take(4096);
  share!.giveAll();
  const { ranges } = share!.limits;
  for (let count = 0; count < ranges; count++) share!.take(4096);
  expect(() => share!.take(4096)).toThrow(`${ranges + 1} DMA ranges of this function; at most ${ranges}: ENOSPC`);
});

test("all functions together stay within the process", () => {
  using many = shares(2000);
  for (const share of many.all.slice(0, 1024)) share.take(64 * GIB);
  expect(() => many.all[1024]!.take(4096)).toThrow("of all functions; at most");
});
