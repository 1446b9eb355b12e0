import { describe, expect, test } from "bun:test";
import { fallback } from "../../../plugins/ha/fallback.ts";
import { next } from "../../../plugins/ha/order.ts";
import type { AdoptionTrouble, WaitingVf } from "../../../src/plugin.ts";

const waiting = (...vfs: readonly Partial<WaitingVf>[]): WaitingVf[] =>
  vfs.map((vf, index) => ({ vf: `0000:5a:00.${index + 1}`, asked: false, frontEndWaits: false, ...vf }));

describe("which VF is taken up next", () => {
  test("those whose front-ends wait come first, then those that somebody asks for, then in the order of adding", () => {
    const asked = { asked: true };
    const waits = { frontEndWaits: true };
    expect(next(waiting({}, {}, {}))).toBe(0);
    expect(next(waiting({}, asked, asked))).toBe(1);
    expect(next(waiting({}, asked, waits))).toBe(2);
    expect(next(waiting({}, waits, { ...asked, ...waits }))).toBe(1);
  });
});

test("only what the record says nothing wrong of, and what kills nobody, is attached anew", () => {
  const what: Record<AdoptionTrouble, string> = {
    "other version": "attach",
    "not open": "attach",
    "device gone": "attach",
    "no PF": "fail",
    damaged: "fail",
    deadly: "fail",
  };
  for (const [trouble, expected] of Object.entries(what))
    expect<string>(fallback(trouble as AdoptionTrouble)).toBe(expected);
});
