import { expect, test } from "bun:test";
import { slowClose, slowIoctl } from "../../../src/native/slow.ts";
import { stopNative } from "../../../src/native/stop.ts";
import { memfd, socketPair } from "../../../src/native/sys.ts";
import { rejection } from "../../kit/rejection.ts";
import { openFds } from "./open-fds.ts";

const FIONREAD = 0x541b;

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

test("a call under way when everything stops still settles", async () => {
  const closing = slowClose(memfd("slow", 1 << 20));
  stopNative();
  await closing;
});
