import { expect, test } from "bun:test";
import { CloseLane, liveFds, OwnedFd } from "../../../src/native/fd.ts";
import { eventfd, fileInfo } from "../../../src/native/sys.ts";
import { openFds } from "./open-fds.ts";

test("an fd is closed once, and its number is not touched after that", () => {
  const before = openFds();
  const liveBefore = liveFds();
  const fd = eventfd();
  const number = fd.number;
  expect(liveFds()).toBe(liveBefore + 1);
  fd[Symbol.dispose]();
  expect(openFds()).toBe(before);
  using other = eventfd();
  expect(other.number).toBe(number);
  fd[Symbol.dispose]();
  expect(fileInfo(number).kind).toBe("eventfd");
  expect(fd.closed).toBe(true);
  expect(() => fd.number).toThrow("after it was closed");
  expect(() => fd.release()).toThrow("after it was closed");
  expect(() => fd.dup()).toThrow("after it was closed");
  expect(liveFds()).toBe(liveBefore + 1);
});

test("a duplicate lives on its own, a released fd belongs to the caller", () => {
  const before = openFds();
  const fd = eventfd();
  const twin = fd.dup();
  const number = fd.release();
  fd[Symbol.dispose]();
  expect(openFds()).toBe(before + 2);
  new OwnedFd(number)[Symbol.dispose]();
  expect(twin.closed).toBe(false);
  twin[Symbol.dispose]();
  expect(openFds()).toBe(before);
});

test("an fd goes over into another lane", () => {
  const before = liveFds();
  const fd = eventfd();
  const { number } = fd;
  const lane = new CloseLane();
  using moved = fd.inLane(lane);
  expect([moved.number, moved.lane === lane, fd.closed]).toEqual([number, true, true]);
  expect(liveFds()).toBe(before + 1);
  expect(() => fd.inLane(lane)).toThrow("after it was closed");
});

test.each([-1, 1.5, Number.NaN, 2 ** 31])("%p is no fd", (number) => {
  const before = liveFds();
  expect(() => new OwnedFd(number)).toThrow("file descriptor is");
  expect(liveFds()).toBe(before);
});
