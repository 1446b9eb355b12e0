import { afterEach, expect, test } from "bun:test";
import { IncomingRequest } from "../../../src/keeper/incoming-request.ts";
import {
  Command,
  type CommandName,
  DELIVERY,
  encodeJson,
  encodeMessage,
  encodePlaces,
  HeaderFlag,
  KEEPER_VERSION,
} from "../../../src/keeper/messages.ts";
import { STORE_LIMITS, Store } from "../../../src/keeper/store.ts";
import { CloseLane, liveFds, pendingCloses } from "../../../src/native/fd.ts";
import { type MessageSocket, sendAtOnce } from "../../../src/native/message-socket.ts";
import { eventfd, isReadable, socketPair } from "../../../src/native/sys.ts";
import { KeeperLab, soon } from "./keeper-lab.ts";

/** What keeps a keeper whole, whatever a client does. */

const NOTHING = new Uint8Array(0);

afterEach(async () => {
  await soon().poll(() => (liveFds() === 0 && pendingCloses() === 0) || undefined, 1);
});

const message = (command: CommandName, key = "", payload: Uint8Array = NOTHING) =>
  encodeMessage({ id: 1, command: Command[command], flags: 0, key, payload });
const hello = (protocol: number) => message("hello", "", encodeJson({ protocol }));

async function greeted(lab: KeeperLab): Promise<MessageSocket> {
  const socket = lab.dial();
  await socket.send(hello(KEEPER_VERSION));
  (await soon().race(socket.receive()))?.[Symbol.dispose]();
  return socket;
}

async function hangsUp(socket: MessageSocket): Promise<boolean> {
  const answer = await soon()
    .race(socket.receive())
    .catch(() => undefined);
  answer?.[Symbol.dispose]();
  return answer === undefined;
}

test("what is deleted counts no more: there is room for as much again", () => {
  using store = new Store({ ...STORE_LIMITS, totalSize: 10 });
  for (let round = 0; round < 3; round++) {
    store.put("a", [], { bytes: new Uint8Array(8), fds: [] })[Symbol.dispose]();
    store.delete("a");
    expect(store.totals).toEqual({ records: 0, bytes: 0, fds: 0 });
  }
});

test("what a client asked for that is gone is not done: the message stays for who comes next", async () => {
  await using lab = await KeeperLab.create();
  const [frontEnd, ours] = socketPair();
  using _frontEnd = frontEnd;
  using _ours = ours;
  {
    using client = await lab.connect();
    await client.put("vf/0", () => ({ record: null, fds: new Map([["connection", ours.number]]) }));
  }
  sendAtOnce(frontEnd.number, new Uint8Array(8));
  const dying = await greeted(lab);
  await dying.send(message("deliver", "vf/0", DELIVERY.encode({ place: 0, take: 8, replySize: 0 })));
  // It hangs up before the keeper has looked.
  dying[Symbol.dispose]();
  using next = await lab.connect();
  expect(await next.list()).toEqual(["vf/0"]);
  expect(isReadable(ours.number)).toBe(true);
});

test("no client has more taken out of a socket than a message has, or stores a record without a key", async () => {
  await using lab = await KeeperLab.create();
  const [frontEnd, ours] = socketPair();
  using _frontEnd = frontEnd;
  using _ours = ours;
  {
    using client = await lab.connect();
    await client.put("vf/0", () => ({ record: null, fds: new Map([["connection", ours.number]]) }));
  }
  const take = (64 << 10) + 1;
  for (const wrong of [
    message("put", "", encodePlaces([], encodeJson(null))),
    message("deliver", "vf/0", DELIVERY.encode({ place: 0, take, replySize: 0 })),
  ]) {
    using socket = await greeted(lab);
    await socket.send(wrong);
    expect(await hangsUp(socket)).toBe(true);
  }
});

test("one that is not served has nothing more to say", async () => {
  await using lab = await KeeperLab.create();
  using socket = lab.dial();
  await socket.send(hello(KEEPER_VERSION + 1));
  expect(await hangsUp(socket)).toBe(false);
  expect(await hangsUp(socket)).toBe(true);
});

test("there are so many connections, and one beyond is hung up on at once", async () => {
  await using lab = await KeeperLab.create();
  using silent = new DisposableStack();
  for (let count = 0; count < 16; count++) silent.use(lab.dial());
  using beyond = lab.dial();
  const answered = await soon(1_000).race(hangsUp(beyond));
  expect(answered).toBe(true);
});

test("a request that is refused holds nothing from then on, and takes its parts all the same", () => {
  const first = { id: 1, command: Command.put, flags: HeaderFlag.more, key: "a", payload: new Uint8Array(64 << 10) };
  const request = new IncomingRequest(first, new CloseLane(), () => {
    throw new Error("too much");
  });
  expect(request.add(first, [eventfd()])).toBe(false);
  expect(liveFds()).toBe(0);
  expect(request.add({ ...first, flags: 0 }, [eventfd()])).toBe(true);
  expect(liveFds()).toBe(0);
  expect(() => request.take()).toThrow("too much");
});

test("a file that is there twice is sent once more, and stays twice", async () => {
  await using lab = await KeeperLab.create();
  using client = await lab.connect();
  using fd = eventfd();
  const put = (...names: string[]) =>
    client.put("a", () => ({ record: null, fds: new Map(names.map((name) => [name, fd.number])) }));
  await put("kick");
  await put("kick", "call");
  const stored = await client.get("a");
  expect([...stored!.fds.keys()]).toEqual(["kick", "call"]);
  for (const one of stored!.fds.values()) one[Symbol.dispose]();
});
