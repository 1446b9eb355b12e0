import { afterEach, describe, expect, test } from "bun:test";
import { silentLogger } from "../../../src/base/log.ts";
import { KeeperLink } from "../../../src/daemon/ha/keeper-link.ts";
import type { Kept } from "../../../src/keeper/keeper-client.ts";
import { STORE_LIMITS } from "../../../src/keeper/store.ts";
import { liveFds, type OwnedFd, pendingCloses } from "../../../src/native/fd.ts";
import { eventfd } from "../../../src/native/sys.ts";
import { rejection } from "../../kit/rejection.ts";
import { KeeperLab, soon } from "../keeper/keeper-lab.ts";

/** Whether what a keeper has is worth something to the next daemon. */

afterEach(async () => {
  await soon().poll(() => (liveFds() === 0 && pendingCloses() === 0) || undefined, 1);
});

const nothing = new Map<string, number>();
const delivery = { take: 1, reply: Uint8Array.of(1) };

/** For a keeper that takes one fd for each record. */
const SMALL = { ...STORE_LIMITS, recordFds: 1 };
const fits = () => ({ record: "it fits", fds: nothing });
const tooBig = ({ number }: OwnedFd) => ({
  record: "it is too big",
  fds: new Map(["a", "b"].map((name) => [name, number])),
});

test("the next daemon inherits what is up to date", async () => {
  await using lab = await KeeperLab.create();
  {
    using link = await KeeperLink.open(lab.path, silentLogger);
    await link.put("vf/0", () => ({ record: "here", fds: nothing }));
  }
  using next = await KeeperLink.open(lab.path, silentLogger);
  expect(await next.list()).toEqual(["vf/0"]);
  expect((await next.get("vf/0"))?.record).toBe("here");
});

test("a daemon that has lost its keeper leaves nothing there for the next one, until all is written anew", async () => {
  await using lab = await KeeperLab.create();
  using link = await KeeperLink.open(lab.path, silentLogger);
  await link.put("vf/0", () => ({ record: "of the past", fds: nothing }));
  let written = 0;
  link.onReturn(async () => {
    written++;
    await link.put("vf/1", () => ({ record: "new", fds: nothing }));
  });
  using page = lab.store.get("daemon")!.fds[0]!.dup();
  lab.hangUp();
  await soon().poll(() => written === 1 || undefined, 5);
  const { isStale } = await import("../../../src/daemon/ha/freshness.ts");
  expect(isStale(page)).toBe(true);
  await soon().poll(() => link.info()?.protects || undefined, 5);
  link[Symbol.dispose]();
  using next = await KeeperLink.open(lab.path, silentLogger);
  expect(await next.list()).toEqual(["vf/1"]);
});

test("a record that the keeper refuses is said to be missing, until it is taken or the keeper is another", async () => {
  await using lab = await KeeperLab.create(SMALL);
  using link = await KeeperLink.open(lab.path, silentLogger);
  using fd = eventfd();
  await link.put("vf/0", fits);
  await link.put("vf/0", () => tooBig(fd));
  expect(link.info()?.protects).toBe(false);
  expect(await link.list()).toEqual([]);
  lab.hangUp();
  await soon().poll(() => link.info() === undefined || undefined, 1);
  await soon().poll(() => link.info()?.protects || undefined, 5);
});

describe("while a record is refused", () => {
  const ways: readonly (readonly [string, (link: KeeperLink, record: () => Kept) => Promise<unknown>])[] = [
    ["put", (link, record) => link.put("vf/0", record)],
    ["delivered", (link, record) => link.deliver("vf/0", { take: record }, delivery)],
  ];

  test.each(ways)("that is %s, a later one of that key is kept", async (_, store) => {
    await using lab = await KeeperLab.create(SMALL);
    using link = await KeeperLink.open(lab.path, silentLogger);
    using fd = eventfd();
    await Promise.all([store(link, () => tooBig(fd)), link.put("vf/0", fits)]);
    expect((await link.get("vf/0"))?.record).toBe("it fits");
    expect(link.info()?.protects).toBe(true);
    // The other way round what it had is of the past, also where the earlier one is stored after the refusal.
    const notOpen = () => ({ record: "its fd is none", fds: new Map([["a", 0x7fff_ffff]]) });
    for (const refused of [() => tooBig(fd), notOpen]) {
      await Promise.all([link.put("vf/0", fits), store(link, refused)]);
      expect(await link.list()).toEqual([]);
      expect(link.info()?.protects).toBe(false);
    }
  });

  test.each(ways)("that is %s, it is deleted: then nobody misses it", async (_, store) => {
    await using lab = await KeeperLab.create(SMALL);
    using link = await KeeperLink.open(lab.path, silentLogger);
    using fd = eventfd();
    await Promise.all([store(link, () => tooBig(fd)), link.delete("vf/0")]);
    expect(await link.list()).toEqual([]);
    expect(link.info()?.protects).toBe(true);
  });
});

test("of a daemon that dies while it writes all anew the next one inherits nothing", async () => {
  await using lab = await KeeperLab.create();
  {
    using link = await KeeperLink.open(lab.path, silentLogger);
    const written = Promise.withResolvers<void>();
    link.onReturn(async () => {
      await link.put("vf/0", fits);
      written.resolve();
      await new Promise(() => {});
    });
    lab.hangUp();
    await soon().race(written.promise);
    expect(link.info()?.protects).toBe(false);
  }
  using next = await KeeperLink.open(lab.path, silentLogger);
  expect(await next.list()).toEqual([]);
});

test("what a keeper has that has gone is not known; one that never was here has nothing", async () => {
  await using lab = await KeeperLab.create();
  using link = await KeeperLink.open(lab.path, silentLogger);
  await link.put("vf/0", fits);
  lab.hangUp();
  await soon().poll(() => link.info() === undefined || undefined, 1);
  expect(await rejection(link.list())).toMatchObject({ code: "connectionLost" });
  using none = await KeeperLink.open(`${lab.path}.none`, silentLogger);
  expect(await none.list()).toEqual([]);
});

test("whether an answer was given where the keeper went away meanwhile is not known", async () => {
  await using lab = await KeeperLab.create();
  using link = await KeeperLink.open(lab.path, silentLogger);
  const delivered = link.deliver("vf/0", undefined, delivery);
  lab.hangUp();
  expect((await delivered).kind).toBe("unknown");
  expect((await link.deliver("vf/0", undefined, delivery)).kind).toBe("undone");
});
