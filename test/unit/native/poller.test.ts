import { afterEach, beforeEach, expect, test } from "bun:test";
import { type Watch, watch } from "../../../src/native/poller.ts";
import { stopNative } from "../../../src/native/stop.ts";
import { drainEventfd, eventfd, signalEventfd, socketPair } from "../../../src/native/sys.ts";
import { eventually, openFds, warmUp } from "./open-fds.ts";

let fdsBefore: number;

beforeEach(() => {
  warmUp();
  fdsBefore = openFds();
});

afterEach(() => {
  warmUp();
  expect(openFds()).toBe(fdsBefore);
});

test("the handler runs once, and again after rearm", async () => {
  using fd = eventfd();
  let calls = 0;
  using ready = watch(fd.number, "in", () => calls++);
  signalEventfd(fd.number);
  expect(await eventually(() => calls === 1)).toBe(true);
  signalEventfd(fd.number);
  await Bun.sleep(5);
  expect(calls).toBe(1);
  ready.rearm();
  ready.rearm();
  expect(await eventually(() => calls === 2)).toBe(true);
  await Bun.sleep(5);
  expect(calls).toBe(2);
  drainEventfd(fd.number);
  ready.rearm();
  await Bun.sleep(5);
  expect(calls).toBe(2);
  signalEventfd(fd.number);
  expect(await eventually(() => calls === 3)).toBe(true);
});

test("a hang-up calls the handler, whatever was waited for", async () => {
  const [left, right] = socketPair();
  const seen: string[] = [];
  using _in = watch(left.number, "in", () => seen.push("in"));
  using out = watch(left.number, "out", () => seen.push("out"));
  expect(await eventually(() => seen.length === 1)).toBe(true);
  right[Symbol.dispose]();
  out.rearm();
  expect(await eventually(() => seen.length === 3)).toBe(true);
  expect(seen.toSorted()).toEqual(["in", "out", "out"]);
  left[Symbol.dispose]();
});

test("after disposal the handler never runs, also where the report is under way", async () => {
  using fd = eventfd();
  signalEventfd(fd.number);
  const calls: string[] = [];
  for (let round = 0; round < 200; round++) {
    const ready = watch(fd.number, "in", () => calls.push("disposed"));
    // Blocks this thread while the poller's reports: the report lies in the queue when the watch goes.
    if (round % 20 === 0) Bun.sleepSync(1);
    ready[Symbol.dispose]();
    ready.rearm();
  }
  let reached = 0;
  using _last = watch(fd.number, "in", () => reached++);
  expect(await eventually(() => reached === 1)).toBe(true);
  expect(calls).toEqual([]);
});

test("a handler may dispose of another watch that is ready too", async () => {
  using first = eventfd();
  using second = eventfd();
  signalEventfd(first.number);
  signalEventfd(second.number);
  let calls = 0;
  const watches: Watch[] = [];
  const handler = () => {
    calls++;
    for (const each of watches) each[Symbol.dispose]();
  };
  watches.push(watch(first.number, "in", handler), watch(second.number, "in", handler));
  Bun.sleepSync(5);
  await Bun.sleep(5);
  expect(calls).toBe(1);
});

test("an fd may be closed and its number reused while it is watched", async () => {
  const old = eventfd();
  const number = old.number;
  let calls = 0;
  const ready = watch(number, "in", () => calls++);
  old[Symbol.dispose]();
  using young = eventfd();
  expect(young.number).toBe(number);
  signalEventfd(young.number);
  await Bun.sleep(5);
  expect(calls).toBe(0);
  let youngCalls = 0;
  using _young = watch(young.number, "in", () => youngCalls++);
  expect(await eventually(() => youngCalls === 1)).toBe(true);
  ready[Symbol.dispose]();
  expect(calls).toBe(0);
});

test("watches come and go by thousands while fds fire", async () => {
  const fds = Array.from({ length: 16 }, eventfd);
  for (const fd of fds) signalEventfd(fd.number);
  const live = new Set<Watch>();
  let wrong = 0;
  let calls = 0;
  for (let round = 0; round < 3000; round++) {
    const fd = fds[round % fds.length]!;
    const each: Watch = watch(fd.number, "in", () => {
      calls++;
      if (!live.has(each)) wrong++;
      if (calls % 2 === 0) each.rearm();
    });
    live.add(each);
    if (live.size > 64) {
      for (const old of live) {
        old[Symbol.dispose]();
        live.delete(old);
        if (live.size <= 32) break;
      }
    }
    if (round % 100 === 0) await Bun.sleep(0);
  }
  expect(await eventually(() => calls > 100)).toBe(true);
  for (const each of live) each[Symbol.dispose]();
  for (const fd of fds) fd[Symbol.dispose]();
  expect(wrong).toBe(0);
});

test("what cannot be waited for is refused", () => {
  expect(() => watch(1_000_000, "in", () => {})).toThrow("EBADF");
  expect(() => watch(-1, "in", () => {})).toThrow("file descriptor is -1");
});

test("the poller stops with watches, twice, and starts again", async () => {
  using fd = eventfd();
  let calls = 0;
  const ready = watch(fd.number, "in", () => calls++);
  stopNative();
  stopNative();
  signalEventfd(fd.number);
  ready.rearm();
  await Bun.sleep(5);
  expect(calls).toBe(0);
  ready[Symbol.dispose]();
  using _again = watch(fd.number, "in", () => calls++);
  expect(await eventually(() => calls === 1)).toBe(true);
});
