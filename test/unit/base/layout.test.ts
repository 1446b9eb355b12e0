import { describe, expect, test } from "bun:test";
import { struct } from "../../../src/base/layout.ts";

describe("struct", () => {
  test("refuses a table whose fields overlap or lie outside", () => {
    expect(() => struct("bad", 4, { a: [0, "u32"], b: [2, "u16"] })).toThrow("bad.b overlaps");
    expect(() => struct("short", 4, { a: [0, "u64"] })).toThrow("short.a overlaps or lies outside 4 bytes");
  });

  test("reads what it writes, little-endian, at an offset", () => {
    const Entry = struct("entry", 24, {
      kind: [0, "u16"],
      flags: [2, "u8"],
      length: [4, "u32"],
      mask: [8, "u64"],
      gpa: [16, "addr"],
    });
    const bytes = new Uint8Array(32).fill(0xee);
    const value = { kind: 0x1234, flags: 7, length: 0xdeadbeef, mask: 0xffff_ffff_ffff_ffffn, gpa: 2 ** 52 };
    Entry.write(bytes, value, 4);
    expect([...bytes.subarray(4, 6)]).toEqual([0x34, 0x12]);
    expect(Entry.read(bytes, 4)).toEqual(value);
    expect(bytes[3]).toBe(0xee);
    expect(bytes[28]).toBe(0xee);
  });

  test("fields that are left out are written as 0", () => {
    const Pair = struct("pair", 8, { a: [0, "u32"], b: [4, "u32"] });
    expect([...Pair.encode({ b: 1 })]).toEqual([0, 0, 0, 0, 1, 0, 0, 0]);
  });

  test("refuses bytes that are too few, and an address beyond 2^53", () => {
    const Address = struct("address", 8, { gpa: [0, "addr"] });
    expect(() => Address.read(new Uint8Array(7))).toThrow("address needs 8 bytes at 0, there are 7");
    expect(() => Address.read(new Uint8Array(8).fill(0xff))).toThrow("beyond 2^53");
  });
});
