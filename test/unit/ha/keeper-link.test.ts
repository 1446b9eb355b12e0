import { afterEach, expect, test } from "bun:test";
import { silentLogger } from "../../../src/base/log.ts";
import { KeeperLink } from "../../../src/daemon/ha/keeper-link.ts";
import { STORE_LIMITS } from "../../../src/keeper/store.ts";
import { liveFds, pendingCloses } from "../../../src/native/fd.ts";
import { eventfd } from "../../../src/native/sys.ts";
import { KeeperLab, soon } from "../keeper/keeper-lab.ts";

/** Whether what a keeper has is worth something to the next daemon. */

afterEach(async () => {
  await soon().poll(() => (liveFds() === 0 && pendingCloses() === 0) || undefined, 1);
});

const nothing = new Map<string, number>();

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

test("a daemon that has lost its keeper leaves nothing there for the next one, and writes all anew when it is back", async () => {
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
  expect(await link.list()).toEqual(["vf/1"]);
});

test("a record that the keeper refuses is said to be missing, until it is taken or the keeper is another", async () => {
  await using lab = await KeeperLab.create({ ...STORE_LIMITS, recordFds: 1 });
  using link = await KeeperLink.open(lab.path, silentLogger);
  using fd = eventfd();
  const big = new Map([
    ["a", fd.number],
    ["b", fd.number],
  ]);
  await link.put("vf/0", () => ({ record: "it is", fds: nothing }));
  await link.put("vf/0", () => ({ record: "it is too big", fds: big }));
  expect(link.info()?.protects).toBe(false);
  expect(await link.list()).toEqual([]);
  lab.hangUp();
  await soon().poll(() => link.info() === undefined || undefined, 1);
  await soon().poll(() => link.info()?.protects || undefined, 5);
});

test("whether an answer was given where the keeper went away meanwhile is not known", async () => {
  await using lab = await KeeperLab.create();
  using link = await KeeperLink.open(lab.path, silentLogger);
  const delivered = link.deliver("vf/0", undefined, { take: 1, reply: Uint8Array.of(1) });
  lab.hangUp();
  expect((await delivered).kind).toBe("unknown");
  expect((await link.deliver("vf/0", undefined, { take: 1, reply: Uint8Array.of(1) })).kind).toBe("undone");
});
