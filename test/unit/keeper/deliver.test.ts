import { afterEach, expect, test } from "bun:test";
import type { KeeperClient } from "../../../src/keeper/keeper-client.ts";
import { STORE_LIMITS } from "../../../src/keeper/store.ts";
import { liveFds, type OwnedFd, pendingCloses } from "../../../src/native/fd.ts";
import { MessageSocket, sendAtOnce, takeBytes } from "../../../src/native/message-socket.ts";
import { eventfd, socketPair } from "../../../src/native/sys.ts";
import { rejection } from "../../kit/rejection.ts";
import { KeeperLab, look, signalled, soon } from "./keeper-lab.ts";

afterEach(async () => {
  await soon().poll(() => (liveFds() === 0 && pendingCloses() === 0) || undefined, 1);
});

const bytes = (text: string) => new TextEncoder().encode(text);

/** A record whose first fd is the keeper's end of a connection; the other end is the front-end's. */
async function connected(client: KeeperClient): Promise<OwnedFd> {
  const [frontEnd, ours] = socketPair();
  using _ = ours;
  await client.put("vf/0", () => ({ record: "running", fds: new Map([["connection", ours.number]]) }));
  return frontEnd;
}

/** @throws VhostdError io where something else lies in the socket */
function read(fd: OwnedFd, size: number): void {
  takeBytes(fd.number, size, fd.lane!)[Symbol.dispose]();
}

test("a message is taken out of a kept connection, and its answer sent on it", async () => {
  await using lab = await KeeperLab.create();
  using client = await lab.connect();
  using frontEnd = await connected(client);
  sendAtOnce(frontEnd.number, bytes("questionnext"));
  expect(await client.deliver("vf/0", 0, 8, bytes("answer"))).toBe(6);
  read(frontEnd, 6);
  // Only that one: the next still lies there.
  expect(await client.deliver("vf/0", 0, 4, bytes("more"))).toBe(4);
  expect(await rejection(client.deliver("vf/0", 0, 1, bytes("?")))).toMatchObject({ code: "io" });
});

test("what is no socket of a record is left alone", async () => {
  await using lab = await KeeperLab.create();
  using client = await lab.connect();
  using event = eventfd();
  await client.put("vf/1", () => ({ record: null, fds: new Map([["kick", event.number]]) }));
  for (const [key, place] of [
    ["vf/1", 0],
    ["vf/1", 1],
    ["vf/2", 0],
  ] as const) {
    expect(await rejection(client.deliver(key, place, 1, bytes("a")))).toMatchObject({ code: "notFound" });
  }
});

test("a record is stored before, with its fds, whatever becomes of the answer", async () => {
  await using lab = await KeeperLab.create();
  using client = await lab.connect();
  const [frontEnd, ours] = socketPair();
  using _ = frontEnd;
  using connection = ours;
  using kick = eventfd();
  const fds = new Map([["connection", connection.number]]);
  const stored = async () => {
    const found = await client.get("vf/0");
    for (const fd of found?.fds.values() ?? []) fd[Symbol.dispose]();
    return [found?.record, ...(found?.fds.keys() ?? [])];
  };
  sendAtOnce(frontEnd.number, bytes("question"));
  // The connection comes with it.
  expect(await client.deliver("vf/0", 0, 8, bytes("a"), { take: () => ({ record: 1, fds }) })).toBe(1);
  read(frontEnd, 1);
  expect(await stored()).toEqual([1, "connection"]);
  fds.set("kick", kick.number);
  // Of its fds the keeper has one already.
  expect(await client.deliver("vf/0", 0, 0, bytes("b"), { take: () => ({ record: 2, fds }) })).toBe(1);
  read(frontEnd, 1);
  expect(await stored()).toEqual([2, "connection", "kick"]);
  expect(lab.store.totals).toMatchObject({ records: 1, fds: 2 });
  const unanswered = client.deliver("vf/0", 2, 0, bytes("c"), { take: () => ({ record: 3, fds }) });
  expect(await rejection(unanswered)).toMatchObject({ code: "notFound" });
  expect(await stored()).toEqual([3, "connection", "kick"]);
  await client.put("vf/0", () => ({ record: 4, fds }));
  expect(await stored()).toEqual([4, "connection", "kick"]);
});

test("one fd takes the place of another, where it is known what the keeper has", async () => {
  await using lab = await KeeperLab.create();
  using client = await lab.connect();
  const [frontEnd, ours] = socketPair();
  using _ = frontEnd;
  using connection = ours;
  using open = new DisposableStack();
  const [kick, call, next] = [1, 2, 3].map((value) => open.use(signalled(value)));
  let [taken, record] = [0, 1];
  const fds = new Map([
    ["connection", connection.number],
    ["kick", kick!.number],
    ["call", call!.number],
  ]);
  const take = () => {
    taken++;
    return { record, fds };
  };
  const deliver = async (name: string, fd: OwnedFd) => {
    await client.deliver("vf/0", 0, 0, bytes("a"), { take, replacement: [name, fd.number] });
    read(frontEnd, 1);
  };
  await client.put("vf/0", take);
  record = 2;
  await deliver("call", next!);
  expect(taken).toBe(1);
  expect(await look(client, "vf/0")).toEqual({ record: 1, signals: { kick: 1, call: 3 } });
  // Also twice, and when the one before it is closed.
  await deliver("call", kick!);
  await deliver("call", call!);
  expect(await look(client, "vf/0")).toEqual({ record: 1, signals: { kick: 1, call: 2 } });
  expect(taken).toBe(1);
  expect(lab.store.totals).toMatchObject({ records: 1, fds: 3 });
  await deliver("err", next!);
  expect([taken, (await look(client, "vf/0"))?.record]).toEqual([2, 2]);
  // Nobody knows what the keeper has while a put is under way.
  const under = client.put("vf/0", take);
  await Promise.all([deliver("call", next!), under]);
  expect(taken).toBe(4);
});

test("an answer with a record that is refused is not given, and neither is kept", async () => {
  await using lab = await KeeperLab.create();
  using client = await lab.connect();
  using frontEnd = await connected(client);
  sendAtOnce(frontEnd.number, bytes("question"));
  const record = "x".repeat(STORE_LIMITS.recordSize);
  const refused = client.deliver("vf/0", 0, 8, bytes("a"), { take: () => ({ record, fds: new Map() }) });
  expect(await rejection(refused)).toMatchObject({ code: "keeperStore" });
  expect(await client.list()).toEqual([]);
  using unread = new MessageSocket(frontEnd, { headerSize: 1, maxFds: 0, bodySize: () => 0 });
  // The keeper's end went with the record, and took nothing out.
  expect(await soon().race(unread.receive())).toBeUndefined();
});

test("a socket that takes nothing more keeps nobody waiting", async () => {
  await using lab = await KeeperLab.create();
  using client = await lab.connect();
  using _ = await connected(client);
  const much = new Uint8Array(16 << 10);
  let sent = much.length;
  for (let time = 0; time < 1000 && sent === much.length; time++) sent = await client.deliver("vf/0", 0, 0, much);
  expect(sent).toBeLessThan(much.length);
  expect(await client.deliver("vf/0", 0, 0, much)).toBe(0);
});
