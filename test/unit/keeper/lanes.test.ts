import { afterEach, expect, test } from "bun:test";
import type { KeeperClient } from "../../../src/keeper/keeper-client.ts";
import { liveFds, type OwnedFd, pendingCloses } from "../../../src/native/fd.ts";
import { sendAtOnce, takeBytes } from "../../../src/native/message-socket.ts";
import { eventfd, socketPair } from "../../../src/native/sys.ts";
import { rejection } from "../../kit/rejection.ts";
import { LingeringSocket } from "../native/lingering-socket.ts";
import { KeeperLab, soon } from "./keeper-lab.ts";

afterEach(async () => {
  await soon().poll(() => (liveFds() === 0 && pendingCloses() === 0) || undefined, 1);
});

/** More files than may wait in a lane. */
const MANY = 1100;
const bytes = (text: string) => new TextEncoder().encode(text);

/** Of one file, that many fds. */
const put = (client: KeeperClient, key: string, fds: readonly OwnedFd[]) =>
  client.put(key, () => ({ record: key, fds: new Map(fds.map((fd, index) => [`fd.${index}`, fd.number])) }));

/** A record with `first`, whose other fds take long to close and are the keeper's alone. */
async function putHostile(client: KeeperClient, key: string, lingering: LingeringSocket, first: readonly OwnedFd[]) {
  using event = eventfd();
  await put(client, key, [...first, lingering.fd, ...Array<OwnedFd>(MANY).fill(event)]);
  lingering.fd[Symbol.dispose]();
}

test("files of one key that take long to close hold up no other key, and the keeper takes no more of that one", async () => {
  await using lab = await KeeperLab.create();
  using client = await lab.connect();
  using lingering = new LingeringSocket();
  using event = eventfd();
  await putHostile(client, "vf/bad", lingering, []);
  await client.delete("vf/bad");
  expect(lab.store.laneOf("vf/bad").full).toBe(true);
  // It is not forgotten among many others.
  for (let index = 0; index < 200; index++) lab.store.laneOf(`vf/${index}`);
  expect(lab.store.laneOf("vf/bad").full).toBe(true);
  // More messages than one that waits for its lane would let through.
  for (let time = 0; time < 3; time++) {
    await put(client, "vf/good", [event]);
    for (const fd of (await client.get("vf/good"))!.fds.values()) fd[Symbol.dispose]();
    await client.delete("vf/good");
  }
  await soon().poll(() => lab.store.laneOf("vf/good").idle || undefined, 1);
  const before = pendingCloses();
  for (let time = 0; time < 3; time++) {
    expect(await rejection(put(client, "vf/bad", [event]))).toMatchObject({ code: "keeperStore" });
    await client.delete("vf/bad");
  }
  // Of the first try no fd was sent, either: the delete before it was answered so.
  expect(pendingCloses()).toBe(before);
  {
    client[Symbol.dispose]();
    using next = await lab.connect();
    for (let time = 0; time < 3; time++) {
      expect(await rejection(put(next, "vf/bad", [event]))).toMatchObject({ code: "keeperStore" });
      await next.delete("vf/bad");
    }
    await soon().poll(() => pendingCloses() === before + 1 || undefined, 1);
    lingering.release();
    await soon().poll(() => lab.store.laneOf("vf/bad").idle || undefined, 1);
    await next.delete("vf/bad");
    await put(next, "vf/bad", [event]);
    expect(await next.list()).toEqual(["vf/bad"]);
  }
});

test("an answer is the client's own to give while too many files of the record are being closed", async () => {
  await using lab = await KeeperLab.create();
  using client = await lab.connect();
  using lingering = new LingeringSocket();
  const [frontEnd, ours] = socketPair();
  using _ = frontEnd;
  using connection = ours;
  await putHostile(client, "vf/0", lingering, [connection]);
  await put(client, "vf/0", [connection]);
  sendAtOnce(frontEnd.number, bytes("question"));
  expect(await rejection(client.deliver("vf/0", 0, 8, bytes("a")))).toMatchObject({ code: "notFound" });
  takeBytes(connection.number, 8, connection.lane!)[Symbol.dispose]();
});

test("fds of each key are in a lane of that key, also those that other clients bring, and of each answer in one", async () => {
  await using lab = await KeeperLab.create();
  using event = eventfd();
  const lanes = (key: string) => new Set(lab.store.get(key)!.fds.map((fd) => fd.lane));
  {
    using first = await lab.connect();
    await put(first, "a", [event, event]);
    await put(first, "b", [event]);
  }
  const laneOfA = lab.store.laneOf("a");
  using next = await lab.connect();
  using other = eventfd();
  await put(next, "a", [event]);
  await put(next, "a", [other, event]);
  expect(lanes("a")).toEqual(new Set([laneOfA]));
  expect(lanes("b").has(laneOfA)).toBe(false);
  const got = await Promise.all(["a", "b"].map(async (key) => [...(await next.get(key))!.fds.values()]));
  using stack = new DisposableStack();
  for (const fd of got.flat()) stack.use(fd);
  expect(got.map((fds) => new Set(fds.map(({ lane }) => lane)).size)).toEqual([1, 1]);
  expect(got[0]![0]!.lane === got[1]![0]!.lane).toBe(false);
});

test("lanes of keys that are gone are dropped, of those that are there they stay", async () => {
  await using lab = await KeeperLab.create();
  using client = await lab.connect();
  await put(client, "stays", []);
  const [stays, first] = [lab.store.laneOf("stays"), lab.store.laneOf("gone/0")];
  for (let index = 1; index < 200; index++) lab.store.laneOf(`gone/${index}`);
  expect(lab.store.laneOf("stays") === stays).toBe(true);
  expect(lab.store.laneOf("gone/0") === first).toBe(false);
});
