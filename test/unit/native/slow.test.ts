import { expect, test } from "bun:test";
import { writeSync } from "node:fs";
import { quickIoctl, slowAccess, slowClose, slowIoctl } from "../../../src/native/slow.ts";
import { stopNative } from "../../../src/native/stop.ts";
import { memfd, openFile, pread, socketPair } from "../../../src/native/sys.ts";
import { rejection } from "../../kit/rejection.ts";
import { openFds } from "./open-fds.ts";

const FIONREAD = 0x541b;
/** By value: which of a terminal's queues (ioctl_tty(2)). */
const TCFLSH = 0x540b;

test("files are closed on threads, many at once", async () => {
  await slowClose(memfd("slow", 4096));
  const before = openFds();
  const files = Array.from({ length: 100 }, (_, index) => memfd(`slow-${index}`, 1 << 20));
  await Promise.all(files.map(slowClose));
  expect(openFds()).toBe(before);
  expect(files.every((file) => file.closed)).toBe(true);
});

test("an ioctl answers in its argument, or with its errno", async () => {
  const before = openFds();
  {
    const [left, right] = socketPair();
    using _left = left;
    using _right = right;
    const argument = new Uint32Array(1);
    expect(await slowIoctl(right.number, FIONREAD, new Uint8Array(argument.buffer))).toBe(0);
    expect(argument[0]).toBe(0);
    using file = memfd("file", 4096);
    expect(await slowIoctl(file.number, FIONREAD, new Uint8Array(argument.buffer))).toBe(0);
    expect(argument[0]).toBe(4096);
    expect((await rejection(slowIoctl(file.number, 0xdead, new Uint8Array(4)))).message).toContain("ioctl 0xdead");
    expect((await rejection(slowIoctl(file.number, -1, new Uint8Array(4)))).message).toContain("ioctl request is -1");
    expect((await rejection(slowIoctl(file.number, 0x80087601, new Uint8Array(4)))).message).toContain(
      "argument size of ioctl 0x80087601 is 4",
    );
    expect((await rejection(slowIoctl(1_000_000, FIONREAD, new Uint8Array(4)))).message).toContain("EBADF");
  }
  await Bun.sleep(5);
  expect(openFds()).toBe(before);
});

test("an ioctl takes its argument by value", async () => {
  using terminal = openFile("/dev/ptmx", "read-write");
  expect(await slowIoctl(terminal.number, TCFLSH, 2)).toBe(0);
  expect((await rejection(slowIoctl(terminal.number, TCFLSH, 99))).message).toContain("EINVAL");
  expect((await rejection(slowIoctl(terminal.number, TCFLSH, -1))).message).toContain("argument of ioctl 0x540b is -1");
  const pointer = await rejection(slowIoctl(terminal.number, 0x80087601, 1));
  expect(pointer.message).toContain("reads 8 bytes; its argument is the number 1");
});

test("accesses to a file are made in their order and width, and each has its own result", async () => {
  const before = openFds();
  {
    using file = memfd("registers", 16);
    const results = await slowAccess(file.number, [
      { offset: 0, width: 4, value: 0xfedcba98 },
      { offset: 0, width: 4 },
      { offset: 6, width: 2, value: 0x1234 },
      { offset: 16, width: 4 },
      { offset: 7, width: 1 },
    ]);
    expect(results.toSpliced(3, 1)).toEqual([0xfedcba98, 0xfedcba98, 0x1234, 0x12]);
    expect(String(results[3])).toContain("0 of 4 bytes were carried over");
    const bytes = new Uint8Array(8);
    pread(file.number, bytes, 0);
    expect([...bytes]).toEqual([0x98, 0xba, 0xdc, 0xfe, 0, 0, 0x34, 0x12]);
    using zero = openFile("/dev/zero", "read");
    const [refused, read] = await slowAccess(zero.number, [
      { offset: 0, width: 1, value: 1 },
      { offset: 0, width: 1 },
    ]);
    expect(String(refused)).toContain("EBADF");
    expect(read).toBe(0);
    const early = slowAccess(file.number, [{ offset: 0, width: 2 }]);
    file[Symbol.dispose]();
    expect(await early).toEqual([0xba98]);
    expect((await rejection(slowAccess(1_000_000, [{ offset: 0, width: 1 }]))).message).toContain("EBADF");
    const wide = slowAccess(zero.number, [{ offset: 0, width: 1, value: 256 }]);
    expect((await rejection(wide)).message).toContain("value is 256");
  }
  await Bun.sleep(5);
  expect(openFds()).toBe(before);
});

test("a question is answered at once, and must have room for the answer", () => {
  const [one, two] = socketPair();
  using _one = one;
  using _two = two;
  writeSync(one.number, new Uint8Array(5));
  const unread = new Uint8Array(4);
  expect(quickIoctl(two.number, FIONREAD, unread)).toBe(0);
  expect([...unread]).toEqual([5, 0, 0, 0]);
  expect(() => quickIoctl(1_000_000, FIONREAD, unread)).toThrow("EBADF");
  expect(() => quickIoctl(two.number, 0x8004_0000, new Uint8Array(2))).toThrow("argument size");
});

test("a call under way when everything stops still settles", async () => {
  const closing = slowClose(memfd("slow", 1 << 20));
  stopNative();
  await closing;
});
