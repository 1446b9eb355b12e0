import { expect, test } from "bun:test";
import { Bytemap, DirtyLogMapping } from "../../../src/native/dirty-log.ts";
import { memfd, pread, pwrite, truncate } from "../../../src/native/sys.ts";

const OFFSET = 4096;

/** A log of this many bytes behind a page that is not the log's. */
function make(size: number) {
  const file = memfd("log", OFFSET + size);
  const log = new DirtyLogMapping(file.number, OFFSET, size);
  const marked = () => {
    const bytes = new Uint8Array(size);
    pread(file.number, bytes, OFFSET);
    return [...bytes].flatMap((byte, at) =>
      [0, 1, 2, 3, 4, 5, 6, 7].flatMap((bit) => ((byte >> bit) & 1 ? [8 * at + bit] : [])),
    );
  };
  return {
    file,
    log,
    marked,
    [Symbol.dispose]: () => {
      log[Symbol.dispose]();
      file[Symbol.dispose]();
    },
  };
}

const range = (first: number, count: number) => Array.from({ length: count }, (_, i) => first + i);

test("marks pages, and those beside them stay as they are", async () => {
  for (const [first, count] of [
    [0, 1],
    [7, 2],
    [3, 3],
    [5, 40],
    [8, 16],
    [127, 1],
    [0, 128],
    [9, 0],
  ] as const) {
    using made = make(16);
    made.log.mark(60, 1);
    made.log.mark(first, count);
    const expected = [...new Set([...range(first, count), 60])].sort((a, b) => a - b);
    expect(made.marked()).toEqual(expected);
    expect(await made.log.count()).toBe(expected.length);
  }
});

test("takes over what maps say, and forgets nothing that was marked", () => {
  using made = make(16);
  const { log, marked } = made;
  log.mark(17, 1);
  log.merge(16, Uint8Array.of(0b1001, 0, 0x80), "bitmap");
  expect(marked()).toEqual([16, 17, 19, 39]);
  log.merge(37, Uint8Array.of(0, 1, 0, 0xff), "bytemap");
  expect(marked()).toEqual([16, 17, 19, 38, 39, 40]);
  expect(() => log.merge(12, Uint8Array.of(1), "bitmap")).toThrow("begins no byte");
});

test("a map of our own is cleared by being taken", async () => {
  using made = make(16);
  using file = memfd("map", 100);
  using map = new Bytemap(file.number, 100);
  for (const [page, value] of [
    [0, 1],
    [9, 255],
    [63, 2],
    [99, 1],
  ] as const) {
    pwrite(file.number, Uint8Array.of(value), page);
  }
  await made.log.take(map);
  expect(made.marked()).toEqual([0, 9, 63, 99]);
  const left = new Uint8Array(100);
  pread(file.number, left, 0);
  expect(left).toEqual(new Uint8Array(100));
});

test("nothing behind the log is touched, also where its file goes on", () => {
  using file = memfd("log", 4096);
  using log = new DirtyLogMapping(file.number, 0, 24);
  const beyond = "dirty log is";
  expect(() => log.mark(192, 1)).toThrow(beyond);
  expect(() => log.mark(190, 3)).toThrow(beyond);
  expect(() => log.merge(184, Uint8Array.of(1, 1), "bitmap")).toThrow(beyond);
  expect(() => log.merge(191, Uint8Array.of(1, 1), "bytemap")).toThrow(beyond);
  expect(() => log.mark(-1, 1)).toThrow(beyond);
  log.mark(0, 192);
  const bytes = new Uint8Array(32);
  pread(file.number, bytes, 0);
  expect([...bytes]).toEqual([...new Array(24).fill(255), ...new Array(8).fill(0)]);
});

test("a log that was cut away is an error, not the end of the process", async () => {
  using made = make(8192);
  using own = memfd("map", 16);
  using map = new Bytemap(own.number, 16);
  pwrite(own.number, Uint8Array.of(1), 3);
  truncate(made.file.number, 0);
  const { log } = made;
  expect(() => log.mark(0, 1)).toThrow("EFAULT");
  expect(() => log.mark(32768, 32768)).toThrow("EFAULT");
  expect(() => log.merge(0, Uint8Array.of(1), "bitmap")).toThrow("EFAULT");
  expect(() => log.merge(0, Uint8Array.of(1), "bytemap")).toThrow("EFAULT");
  const errors = await Promise.all([log.count(), log.take(map)].map((one) => one.then(() => "none", String)));
  expect(errors.every((error) => error.includes("EFAULT"))).toBe(true);
  log[Symbol.dispose]();
  expect(() => log.mark(0, 1)).toThrow("after it was disposed of");
});

test("counts a large log piece by piece", async () => {
  const size = (2 << 20) + 13;
  using made = make(size);
  made.log.mark(1000, 9_000_000);
  expect(await made.log.count()).toBe(9_000_000);
});

test("marks many pages without holding up the event loop", async () => {
  using made = make(3 << 20);
  let turns = 0;
  const count = () => {
    turns++;
    next = setImmediate(count);
  };
  let next = setImmediate(count);
  await made.log.markMany(3, 8 * (3 << 20) - 5);
  clearImmediate(next);
  expect(turns).toBeGreaterThanOrEqual(2);
  expect(await made.log.count()).toBe(8 * (3 << 20) - 5);
  const bytes = new Uint8Array(1);
  for (const [at, expected] of [
    [0, 0b1111_1000],
    [1 << 20, 0xff],
    [(3 << 20) - 1, 0b0011_1111],
  ] as const) {
    pread(made.file.number, bytes, OFFSET + at);
    expect(bytes[0]).toBe(expected);
  }
});
