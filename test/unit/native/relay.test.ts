import { afterEach, beforeEach, expect, test } from "bun:test";
import { Mapping } from "../../../src/native/mmio.ts";
import { relayKick } from "../../../src/native/relay.ts";
import { stopNative } from "../../../src/native/stop.ts";
import { drainEventfd, eventfd, memfd, signalEventfd, truncate } from "../../../src/native/sys.ts";
import { fullEventfd } from "./full-eventfd.ts";
import { eventually, openFds, warmUp } from "./open-fds.ts";

let fdsBefore: number;

beforeEach(() => {
  warmUp();
  fdsBefore = openFds();
});

afterEach(() => {
  warmUp();
  expect(openFds()).toBeLessThanOrEqual(fdsBefore);
});

test("each kick rings an eventfd, the first one although it came before the connection", async () => {
  using kick = eventfd();
  using doorbell = eventfd();
  signalEventfd(kick.number);
  const connection = relayKick(kick.number, { eventfd: doorbell.number });
  for (let round = 0; round < 20; round++) {
    expect(await eventually(() => drainEventfd(doorbell.number) > 0)).toBe(true);
    signalEventfd(kick.number);
  }
  expect(await eventually(() => drainEventfd(doorbell.number) > 0)).toBe(true);
  connection[Symbol.dispose]();
  signalEventfd(kick.number);
  await Bun.sleep(5);
  expect(drainEventfd(doorbell.number)).toBe(0);
  // Never read by the relay: all signals are still there.
  expect(drainEventfd(kick.number)).toBe(22);
});

test("each kick writes a mapping, in the width that was asked for", async () => {
  using kick = eventfd();
  using file = memfd("doorbells", 4096);
  using mapping = Mapping.map(file.number, 0, 4096, "read-write");
  mapping.write32(8, 0xffffffff);
  {
    using _narrow = relayKick(kick.number, { mapping, offset: 8, width: 2, value: 3 });
    using _wide = relayKick(kick.number, { mapping, offset: 12, width: 4, value: 0x80000001 });
    for (let round = 0; round < 20; round++) {
      signalEventfd(kick.number);
      expect(await eventually(() => mapping.read32(8) === 0xffff0003 && mapping.read32(12) === 0x80000001)).toBe(true);
      mapping.write32(8, 0xffffffff);
      mapping.write32(12, 0);
    }
  }
  const place = { mapping, width: 2 as const };
  expect(() => relayKick(kick.number, { ...place, offset: 4096, value: 0 })).toThrow("offset in a mapping");
  expect(() => relayKick(kick.number, { ...place, offset: 0, value: 65536 })).toThrow("value of a doorbell");
  expect(() => relayKick(1_000_000, { ...place, offset: 0, value: 0 })).toThrow("EBADF");
});

test("a hostile peer's full eventfds, as kick and as doorbell, hinder nobody", async () => {
  using kick = fullEventfd();
  using full = fullEventfd();
  using doorbell = eventfd();
  using _stuck = relayKick(kick.number, { eventfd: full.number });
  using _other = relayKick(kick.number, { eventfd: doorbell.number });
  for (let round = 0; round < 3; round++) {
    expect(await eventually(() => drainEventfd(doorbell.number) > 0)).toBe(true);
    signalEventfd(kick.number);
  }
});

test("memory that vanishes silences its own connection only", async () => {
  using kick = eventfd();
  using doorbell = eventfd();
  using file = memfd("doorbells", 4096);
  using mapping = Mapping.map(file.number, 0, 4096, "read-write");
  truncate(file.number, 0);
  using _gone = relayKick(kick.number, { mapping, offset: 0, width: 2, value: 1 });
  using _other = relayKick(kick.number, { eventfd: doorbell.number });
  signalEventfd(kick.number);
  expect(await eventually(() => drainEventfd(doorbell.number) > 0)).toBe(true);
});

test("thousands of connections come and go under traffic", async () => {
  using kick = eventfd();
  using doorbell = eventfd();
  const file = memfd("doorbells", 4096);
  for (let round = 0; round < 3000; round++) {
    const mapping = Mapping.map(file.number, 0, 4096, "read-write");
    const toEventfd = relayKick(kick.number, { eventfd: doorbell.number });
    const toMapping = relayKick(kick.number, { mapping, offset: 0, width: 4, value: round + 1 });
    signalEventfd(kick.number);
    if (round % 50 === 0) expect(await eventually(() => mapping.read32(0) === round + 1)).toBe(true);
    toMapping[Symbol.dispose]();
    toEventfd[Symbol.dispose]();
    // From here on the thread must not touch it: the memory is unmapped at once.
    mapping[Symbol.dispose]();
  }
  file[Symbol.dispose]();
  drainEventfd(doorbell.number);
  signalEventfd(kick.number);
  await Bun.sleep(2);
  expect(drainEventfd(doorbell.number)).toBe(0);
});

test("the relay stops with connections and starts again", async () => {
  using kick = eventfd();
  using doorbell = eventfd();
  const old = relayKick(kick.number, { eventfd: doorbell.number });
  stopNative();
  drainEventfd(doorbell.number);
  signalEventfd(kick.number);
  await Bun.sleep(2);
  expect(drainEventfd(doorbell.number)).toBe(0);
  {
    using _again = relayKick(kick.number, { eventfd: doorbell.number });
    old[Symbol.dispose]();
    expect(await eventually(() => drainEventfd(doorbell.number) > 0)).toBe(true);
  }
});
