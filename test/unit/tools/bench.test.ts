import { describe, expect, test } from "bun:test";
import { formatTable, toObject } from "../../../tools/bench.ts";
import { figure } from "../../bench/kit.ts";

const quick = figure("start.a_ms", [3, 1, 5, 2, 4], "ms", { at: "most", value: 3 });
const slow = figure("start.b_ratio", [0.5, 0.75, 0.25, 1, 0.625, 0.375], "ratio", { at: "least", value: 2 });
const compared = { ...figure("net.d_ratio", [2, 2, 2, 2, 2], "ratio", { at: "least", value: 1 }), peer: "theirs 1.0" };
const plain = figure("memory.c_kib", [1234, 1234, 1234, 1234, 1234], "KiB");

describe("figures", () => {
  test("are the median with the lowest and the highest; an even number has the mean of the middle two", () => {
    expect(quick).toMatchObject({ value: 3, min: 1, max: 5 });
    expect(slow).toMatchObject({ value: 0.5625, min: 0.25, max: 1 });
  });

  test("need five runs", () => {
    expect(() => figure("start.a_ms", [1, 2, 3, 4], "ms")).toThrow("start.a_ms has 4 runs, expected 5 at least");
  });

  test("as an object: by key, with whether the target is met where there is one", () => {
    expect(toObject([quick, slow, plain])).toEqual({
      "start.a_ms": { value: 3, min: 1, max: 5, unit: "ms", target: { at: "most", value: 3 }, met: true },
      "start.b_ratio": {
        value: 0.5625,
        min: 0.25,
        max: 1,
        unit: "ratio",
        target: { at: "least", value: 2 },
        met: false,
      },
      "memory.c_kib": { value: 1234, min: 1234, max: 1234, unit: "KiB" },
    });
  });

  test("as a table: one line each", () => {
    expect(formatTable([quick, slow, compared, plain]).split("\n")).toEqual([
      "figure         median    min   max  unit   target",
      "start.a_ms       3.00   1.00  5.00  ms     ≤ 3     met",
      "start.b_ratio   0.563  0.250  1.00  ratio  ≥ 2     NOT MET",
      "net.d_ratio      2.00   2.00  2.00  ratio  ≥ 1     met      peer: theirs 1.0",
      "memory.c_kib     1234   1234  1234  KiB",
    ]);
  });
});
