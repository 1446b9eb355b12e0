import { afterEach, expect, test } from "bun:test";
import type { KeeperClient } from "../../../src/keeper/keeper-client.ts";
import { STORE_LIMITS } from "../../../src/keeper/store.ts";
import { liveFds, type OwnedFd, pendingCloses } from "../../../src/native/fd.ts";
import { sendAtOnce, takeBytes } from "../../../src/native/message-socket.ts";
import { eventfd, socketPair } from "../../../src/native/sys.ts";
import { rejection } from "../../kit/rejection.ts";
import { KeeperLab, soon } from "./keeper-lab.ts";

afterEach(async () => {
  await soon().poll(() => (liveFds() === 0 && pendingCloses() === 0) || undefined, 1);
});

const bytes = (text: string) => new TextEncoder().encode(text);

/** A record whose first fd is the keeper's end of a connection; the other end is the front-end's. */
async function connected(client: KeeperClient, quiet = false): Promise<{ frontEnd: OwnedFd; stored: Promise<void> }> {
  const [frontEnd, ours] = socketPair();
  const stored = client
    .put("vf/0", () => ({ record: "running", fds: new Map([["connection", ours.number]]) }), quiet)
    .finally(() => ours[Symbol.dispose]());
  if (!quiet) await stored;
  return { frontEnd, stored };
}

/** @throws VhostdError io where something else lies in the socket */
function read(fd: OwnedFd, size: number): void {
  takeBytes(fd.number, size, fd.lane!);
}

test("a message is taken out of a kept connection, and its answer sent on it", async () => {
  await using lab = await KeeperLab.create();
  using client = await lab.connect();
  const { frontEnd } = await connected(client);
  using _ = frontEnd;
  sendAtOnce(frontEnd.number, bytes("questionnext"));
  expect(await client.answer("vf/0", 0, 8, bytes("answer"))).toBe(6);
  read(frontEnd, 6);
  // Only that one: the next still lies there.
  expect(await client.answer("vf/0", 0, 4, bytes("more"))).toBe(4);
  expect(await rejection(client.answer("vf/0", 0, 1, bytes("?")))).toMatchObject({ code: "io" });
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
    expect(await rejection(client.answer(key, place, 1, bytes("a")))).toMatchObject({ code: "notFound" });
  }
});

test("a put that is not answered is done when the request behind it is answered, whatever that says", async () => {
  await using lab = await KeeperLab.create();
  using client = await lab.connect();
  const { frontEnd, stored } = await connected(client, true);
  using _ = frontEnd;
  sendAtOnce(frontEnd.number, bytes("question"));
  expect(await client.answer("vf/0", 0, 8, bytes("a"))).toBe(1);
  await stored;
  const quiet = client.put("vf/3", () => ({ record: 3, fds: new Map() }), true);
  expect(await rejection(client.answer("vf/3", 0, 8, bytes("a")))).toMatchObject({ code: "notFound" });
  await quiet;
  expect((await client.get("vf/3"))?.record).toBe(3);
});

test("a put that is refused says so all the same", async () => {
  await using lab = await KeeperLab.create({ ...STORE_LIMITS, records: 1 });
  using client = await lab.connect();
  await client.put("vf/0", () => ({ record: 0, fds: new Map() }));
  const refused = rejection(client.put("vf/1", () => ({ record: 1, fds: new Map() }), true));
  await rejection(client.answer("vf/1", 0, 1, bytes("a")));
  expect(await refused).toMatchObject({ code: "keeperStore" });
});

test("an answer behind a put that is refused is not given", async () => {
  await using lab = await KeeperLab.create();
  using client = await lab.connect();
  const { frontEnd } = await connected(client);
  using _ = frontEnd;
  sendAtOnce(frontEnd.number, bytes("question"));
  const record = "x".repeat(STORE_LIMITS.recordSize);
  const refused = rejection(client.put("vf/0", () => ({ record, fds: new Map() }), true));
  expect(await rejection(client.answer("vf/0", 0, 8, bytes("a")))).toMatchObject({ code: "notFound" });
  expect(await refused).toMatchObject({ code: "keeperStore" });
});

test("a socket that takes nothing more keeps nobody waiting", async () => {
  await using lab = await KeeperLab.create();
  using client = await lab.connect();
  const { frontEnd } = await connected(client);
  using _ = frontEnd;
  const much = new Uint8Array(16 << 10);
  let sent = much.length;
  for (let time = 0; time < 1000 && sent === much.length; time++) sent = await client.answer("vf/0", 0, 0, much);
  expect(sent).toBeLessThan(much.length);
  expect(await client.answer("vf/0", 0, 0, much)).toBe(0);
});
