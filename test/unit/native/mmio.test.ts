import { expect, test } from "bun:test";
import { readFileSync } from "node:fs";
import { Mapping } from "../../../src/native/mmio.ts";
import { relayKick } from "../../../src/native/relay.ts";
import { eventfd, memfd, pread, signalEventfd, truncate } from "../../../src/native/sys.ts";
import { eventually, openFds, warmUp } from "./open-fds.ts";

test("each access has its width and meets the file", () => {
  using file = memfd("registers", 8192);
  using mapping = Mapping.map(file.number, 4096, 4096, "read-write");
  mapping.write32(4, 0xfedcba98);
  expect(mapping.read32(4)).toBe(0xfedcba98);
  expect(mapping.read16(6)).toBe(0xfedc);
  expect(mapping.read8(5)).toBe(0xba);
  mapping.write16(4, 0x1122);
  mapping.write8(7, 0x33);
  expect(mapping.read32(4)).toBe(0x33dc1122);
  const bytes = new Uint8Array(4);
  pread(file.number, bytes, 4100);
  expect([...bytes]).toEqual([0x22, 0x11, 0xdc, 0x33]);
});

test("accesses out of bounds, misaligned, of wrong values or without permission are refused", () => {
  using file = memfd("registers", 4096);
  using mapping = Mapping.map(file.number, 0, 4096, "read-write");
  expect(() => mapping.read32(4096)).toThrow("offset in a mapping is 4096");
  expect(() => mapping.read32(4094)).toThrow("offset in a mapping is 4094");
  expect(() => mapping.read8(-1)).toThrow("offset in a mapping is -1");
  expect(() => mapping.read16(1)).toThrow("no multiple of 2");
  expect(() => mapping.write16(0, 0x10000)).toThrow("value is 65536");
  expect(() => mapping.write8(0, Number.NaN)).toThrow("value is NaN");
  using readOnly = Mapping.map(file.number, 0, 4096, "read");
  expect(() => readOnly.write8(0, 1)).toThrow("reading only");
  expect(() => Mapping.map(file.number, 1, 4096, "read")).toThrow("EINVAL");
  expect(() => Mapping.map(file.number, 0, 0, "read")).toThrow("size of a mapping is 0");
});

test("memory that was cut away is an error, not the end of the process", () => {
  using file = memfd("registers", 4096);
  using mapping = Mapping.map(file.number, 0, 4096, "read-write");
  truncate(file.number, 0);
  for (let round = 0; round < 100; round++) {
    expect(() => mapping.read32(0)).toThrow("EFAULT");
    expect(() => mapping.write32(0, 1)).toThrow("EFAULT");
  }
  truncate(file.number, 4096);
  expect(mapping.read32(0)).toBe(0);
});

test("a mapping that the relay uses stays until the relay has let go", async () => {
  warmUp();
  const before = openFds();
  {
    using file = memfd("registers", 4096);
    using kick = eventfd();
    const mapping = Mapping.map(file.number, 0, 4096, "read-write");
    const connection = relayKick(kick.number, { mapping, offset: 8, width: 4, value: 77 });
    mapping[Symbol.dispose]();
    expect(() => mapping.read32(8)).toThrow("after it was disposed of");
    signalEventfd(kick.number);
    const bytes = new Uint8Array(1);
    expect(await eventually(() => pread(file.number, bytes, 8) === 1 && bytes[0] === 77)).toBe(true);
    connection[Symbol.dispose]();
    connection[Symbol.dispose]();
  }
  expect(openFds()).toBe(before);
  expect(await Bun.file("/proc/self/maps").text()).not.toContain("memfd:registers");
});

test("a mapping is disowned: its pages stay in the file and are not this process's any more", async () => {
  const size = 32 << 20;
  using file = memfd("disowned", size);
  using mapping = Mapping.map(file.number, 0, size, "read-write");
  for (let at = 0; at < size; at += 4096) mapping.write8(at, 7);
  const before = shared();
  await mapping.disownInParts(16 << 20);
  expect(before - shared()).toBeGreaterThan(24 << 20);
  expect(mapping.read8(size - 4096)).toBe(7);
});

/** Bytes of shared memory that count as this process's. */
function shared(): number {
  return Number(/^RssShmem:\s*(\d+) kB$/m.exec(readFileSync("/proc/self/status", "utf8"))?.[1]) * 1024;
}
