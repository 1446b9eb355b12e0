import { afterEach, expect, test } from "bun:test";
import { Deadline } from "../../../src/base/deadline.ts";
import { silentLogger } from "../../../src/base/log.ts";
import type { Keeper } from "../../../src/daemon/keeper.ts";
import { connectDatagram, sendDatagram } from "../../../src/native/datagram.ts";
import { liveFds, type OwnedFd, pendingCloses } from "../../../src/native/fd.ts";
import { compareFiles } from "../../../src/native/file-order.ts";
import { drainEventfd, eventfd, memfd, pwrite, signalEventfd, socketPair } from "../../../src/native/sys.ts";
import { FdStore, type FdStoreOptions } from "../../../src/systemd/fd-store.ts";
import { FakeSystemd } from "../../kit/fake-systemd.ts";
import { rejection } from "../../kit/rejection.ts";

const soon = () => Deadline.after(5_000, "the test");

afterEach(async () => {
  await soon().poll(() => (liveFds() === 0 && pendingCloses() === 0) || undefined, 1);
});

/** The process after this one: it is handed what systemd stores. */
async function next(systemd: FakeSystemd, options: Partial<FdStoreOptions> = {}): Promise<FdStore> {
  const handed = new Map(systemd.stored.map(({ name, fd }) => [name, fd.dup()] as const));
  return FdStore.open({ address: systemd.address, max: 100, log: silentLogger, ...options }, handed);
}

/** An eventfd that was signalled so often. */
function signalled(times: number): OwnedFd {
  const fd = eventfd();
  for (let time = 0; time < times; time++) signalEventfd(fd.number);
  return fd;
}

const named = (fds: Record<string, OwnedFd>) =>
  new Map(Object.entries(fds).map(([name, { number }]) => [name, number] as const));

/** What is stored under that key: the record, and which of `files` its fds are of. */
async function found(keeper: Keeper, key: string, files: Record<string, OwnedFd>): Promise<unknown> {
  const stored = await keeper.get(key);
  if (stored === undefined) return undefined;
  const fds = [...stored.fds].map(([name, fd]) => {
    using own = fd;
    return [name, Object.keys(files).find((file) => compareFiles(files[file]!.number, own.number) === 0)];
  });
  return [stored.record, Object.fromEntries(fds)];
}

test("the next process finds records with their fds", async () => {
  using systemd = new FakeSystemd();
  using a = signalled(1);
  using b = eventfd();
  {
    using store = await next(systemd);
    await store.put("vf/0000:01:00.1 é:", () => ({ record: { of: ["a", "b"] }, fds: named({ "x:kick 0": a, b }) }));
    await store.put("pf/0", () => ({ record: null, fds: new Map() }));
    expect(await store.list()).toEqual(["vf/0000:01:00.1 é:", "pf/0"]);
    expect(await found(store, "pf/0", {})).toEqual([null, {}]);
  }
  expect(systemd.refused).toBe(0);
  using store = await next(systemd);
  expect((await store.list()).toSorted()).toEqual(["pf/0", "vf/0000:01:00.1 é:"]);
  const files = { a, b };
  expect(await found(store, "vf/0000:01:00.1 é:", files)).toEqual([{ of: ["a", "b"] }, { "x:kick 0": "a", b: "b" }]);
  expect(await found(store, "vf/0", files)).toBeUndefined();
  expect(drainEventfd(a.number)).toBe(1);
});

test("a put stores what is new, then the record, and removes what is of no use after it", async () => {
  using systemd = new FakeSystemd();
  using a = eventfd();
  using b = eventfd();
  using store = await next(systemd);
  systemd.journal.length = 0;
  await store.put("vf/0", () => ({ record: 1, fds: named({ a, again: a }) }));
  const [file, record] = systemd.names;
  expect(systemd.journal).toEqual([`+${file}`, `+${record}`, "barrier"]);
  systemd.journal.length = 0;
  await store.put("vf/0", () => ({ record: 2, fds: named({ a, b }) }));
  const [, ...added] = systemd.names;
  expect(systemd.journal).toEqual([...added.map((name) => `+${name}`), `-${record}`, "barrier"]);
  systemd.journal.length = 0;
  await store.put("vf/0", () => ({ record: 3, fds: named({ b }) }));
  expect(systemd.journal.slice(1)).toEqual([`-${added[1]}`, `-${file}`, "barrier"]);
  expect(systemd.names.length).toBe(2);
  await store.delete("vf/0");
  await store.delete("vf/0");
  expect(systemd.names).toEqual([]);
  expect(await store.list()).toEqual([]);
  expect(systemd.refused).toBe(0);
});

test("a file that was removed is stored anew", async () => {
  using systemd = new FakeSystemd();
  using a = eventfd();
  using store = await next(systemd);
  const put = (key: string) => store.put(key, () => ({ record: key, fds: named({ a }) }));
  await put("one");
  // All of them are under way at once.
  await Promise.all([store.delete("one"), put("two"), store.delete("two"), put("three"), put("four"), put("three")]);
  expect((await store.list()).toSorted()).toEqual(["four", "three"]);
  expect(systemd.refused).toBe(0);
  using later = await next(systemd);
  expect((await later.list()).toSorted()).toEqual(["four", "three"]);
  expect(await found(later, "three", { a })).toEqual(["three", { a: "a" }]);
});

test("a file that is wanted again while it is removed is stored anew", async () => {
  using systemd = new FakeSystemd();
  using a = eventfd();
  using other = connectDatagram(systemd.address);
  using store = await next(systemd);
  await store.put("one", () => ({ record: 1, fds: named({ a }) }));
  systemd.pause();
  while (sendDatagram(other.number, Buffer.from("X_OTHER=1"), []));
  systemd.step();
  // There is room for the removal of the record, and not for that of the file.
  const deleted = store.delete("one");
  await Bun.sleep(20);
  const stored = store.put("two", () => ({ record: 2, fds: named({ a }) }));
  systemd.resume();
  await Promise.all([deleted, stored]);
  using later = await next(systemd);
  expect(await found(later, "two", { a })).toEqual([2, { a: "a" }]);
});

test("of many files each is stored once", async () => {
  using systemd = new FakeSystemd();
  using stack = new DisposableStack();
  const files = Object.fromEntries(Array.from({ length: 60 }, (_, index) => [`${index}`, stack.use(eventfd())]));
  using store = await next(systemd);
  for (const key of ["one", "two"]) await store.put(key, () => ({ record: key, fds: named(files) }));
  expect(systemd.names.length).toBe(62);
  using later = await next(systemd);
  await later.put("two", () => ({ record: "three", fds: named(files) }));
  expect(await found(later, "two", files)).toEqual([
    "three",
    Object.fromEntries(Object.keys(files).map((k) => [k, k])),
  ]);
  expect(systemd.refused).toBe(0);
});

test("whatever message is the last one, each record is there whole, of before or after", async () => {
  using a = eventfd();
  using b = eventfd();
  using c = eventfd();
  const files = { a, b, c };
  const before = ["before", { x: "a", y: "b" }];
  const after = ["after", { y: "c", z: "b" }];
  let messages = 0;
  for (let last = 0; last <= messages; last++) {
    using systemd = new FakeSystemd();
    using store = await next(systemd);
    await store.put("vf/0", () => ({ record: "before", fds: named({ x: a, y: b }) }));
    systemd.dieAfter(last);
    systemd.journal.length = 0;
    await store.put("vf/0", () => ({ record: "after", fds: named({ y: c, z: b }) }));
    messages = systemd.journal.length - 1;
    systemd.dieAfter(undefined);
    using later = await next(systemd);
    const there = await found(later, "vf/0", files);
    // The record is the second message.
    expect(there).toEqual(last < 2 ? before : after);
    // What nothing names is gone.
    await later.delete("vf/1");
    expect(systemd.names.length).toBe(3);
    expect(await found(later, "vf/0", files)).toEqual(there);
  }
  expect(messages).toBe(4);
});

test("more than the service manager takes is refused, and what was there stays", async () => {
  using systemd = new FakeSystemd({ max: 4 });
  using a = eventfd();
  using b = eventfd();
  using c = eventfd();
  using store = await next(systemd, { max: 4 });
  await store.put("vf/0", () => ({ record: 0, fds: named({ a, b }) }));
  expect(await rejection(store.put("vf/0", () => ({ record: 1, fds: named({ a, b, c }) })))).toMatchObject({
    code: "keeperStore",
    message: "fds in the fd store of systemd with vf/0: 5, at most 4",
    fix: "raise FileDescriptorStoreMax= of the service",
  });
  expect(await found(store, "vf/0", { a, b })).toEqual([0, { a: "a", b: "b" }]);
  await store.put("vf/0", () => ({ record: 2, fds: named({ b }) }));
  await store.put("vf/0", () => ({ record: 3, fds: named({ c }) }));
  expect(await found(store, "vf/0", { c })).toEqual([3, { c: "c" }]);
  expect(systemd.names.length).toBe(2);
  expect(systemd.refused).toBe(0);
  const long = "x".repeat(1 << 20);
  expect(await rejection(store.put("vf/0", () => ({ record: long, fds: new Map() })))).toMatchObject({
    code: "keeperStore",
  });
  expect(await found(store, "vf/0", { c })).toEqual([3, { c: "c" }]);
});

test("a record whose fds are not all there gives way to the one before it", async () => {
  using systemd = new FakeSystemd();
  using a = eventfd();
  using b = eventfd();
  {
    using store = await next(systemd);
    await store.put("vf/0", () => ({ record: "before", fds: named({ a }) }));
    systemd.deafTo = "FDSTOREREMOVE=1";
    await store.put("vf/0", () => ({ record: "after", fds: named({ a, b }) }));
    systemd.deafTo = undefined;
  }
  const lost = systemd.stored.find(({ fd }) => compareFiles(fd.number, b.number) === 0)!;
  systemd.stored.splice(systemd.stored.indexOf(lost), 1);
  lost.fd[Symbol.dispose]();
  const warnings: string[] = [];
  using store = await next(systemd, { log: { ...silentLogger, warn: (message) => warnings.push(message) } });
  expect(warnings).toEqual(["a record of vf/0 is dropped: 1 of its fds are not stored"]);
  expect(await found(store, "vf/0", { a })).toEqual(["before", { a: "a" }]);
});

test("what is no record is dropped, and the numbers of others are not used again", async () => {
  using systemd = new FakeSystemd();
  using sender = connectDatagram(systemd.address);
  const contents = ["", "{", "null", '{"key":1,"fds":[],"record":0}', '{"key":"vf/0","fds":[["a",null]],"record":0}'];
  for (const [index, content] of contents.entries()) {
    using file = memfd("no record", content.length);
    pwrite(file.number, Buffer.from(content), 0);
    const message = Buffer.from(`FDSTORE=1\nFDNAME=vhostd-record-${index + 50}\nFDPOLL=0`);
    sendDatagram(sender.number, message, [file.number]);
  }
  using odd = eventfd();
  sendDatagram(sender.number, Buffer.from("FDSTORE=1\nFDNAME=vhostd-record-70\nFDPOLL=0"), [odd.number]);
  await soon().poll(() => systemd.names.length === 6 || undefined, 1);
  const warnings: string[] = [];
  using store = await next(systemd, { log: { ...silentLogger, warn: (message) => warnings.push(message) } });
  expect(warnings.length).toBe(6);
  expect(await store.list()).toEqual([]);
  await store.put("vf/0", () => ({ record: 0, fds: new Map() }));
  expect(systemd.names).toEqual(["vhostd-record-71"]);
});

test("a put that systemd does not come to ends in time, and the next one goes on from there", async () => {
  using systemd = new FakeSystemd();
  using a = eventfd();
  using store = await next(systemd, { patience: 50 });
  systemd.pause();
  const started = rejection(store.put("vf/0", () => ({ record: 0, fds: named({ a }) })));
  expect(await started).toMatchObject({ code: "timedOut" });
  systemd.resume();
  await store.put("vf/0", () => ({ record: 1, fds: named({ a }) }));
  expect(systemd.names.length).toBe(2);
  expect(systemd.refused).toBe(0);
  using later = await next(systemd);
  expect(await found(later, "vf/0", { a })).toEqual([1, { a: "a" }]);
});

test("sockets of records that can be read are told", async () => {
  using systemd = new FakeSystemd();
  using store = await next(systemd);
  const [near, far] = socketPair();
  using stored = near;
  using peer = far;
  using file = eventfd();
  await store.put("vf/0", () => ({ record: 0, fds: named({ file, stored }) }));
  const asked = [
    ["vf/0", 0],
    ["vf/0", 1],
    ["vf/0", 2],
    ["vf/1", 0],
  ] as const;
  expect(await store.readable(asked)).toEqual([undefined, false, undefined, undefined]);
  sendDatagram(peer.number, Buffer.from("x"), []);
  expect(await store.readable(asked)).toEqual([undefined, true, undefined, undefined]);
});
