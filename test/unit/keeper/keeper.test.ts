import { afterEach, describe, expect, test } from "bun:test";
import { KeeperClient } from "../../../src/keeper/keeper-client.ts";
import {
  Command,
  DELIVERY,
  encodeJson,
  encodeMessage,
  encodePlaces,
  HEADER,
  HeaderFlag,
  KEEPER_FRAMING,
  KEEPER_VERSION,
  NEW_FD,
} from "../../../src/keeper/messages.ts";
import { STORE_LIMITS } from "../../../src/keeper/store.ts";
import { liveFds, type OwnedFd, pendingCloses } from "../../../src/native/fd.ts";
import { MessageSocket } from "../../../src/native/message-socket.ts";
import { accept, eventfd, listenUnix, socketPair } from "../../../src/native/sys.ts";
import { rejection } from "../../kit/rejection.ts";
import { KeeperLab, look, signalled, soon } from "./keeper-lab.ts";

afterEach(async () => {
  await soon().poll(() => (liveFds() === 0 && pendingCloses() === 0) || undefined, 1);
});

const NOTHING = new Uint8Array(0);

/** Puts a record with eventfds that tell their place. */
async function put(client: KeeperClient, key: string, record: string, fds = 0): Promise<void> {
  using stack = new DisposableStack();
  const owned = Array.from({ length: fds }, (_, index) => stack.use(signalled(index + 1)));
  await client.put(key, () => ({ record, fds: new Map(owned.map((fd, index) => [`fd.${index}`, fd.number])) }));
}

describe("records", () => {
  test("come back as they were put, with their fds, also for the next client", async () => {
    await using lab = await KeeperLab.create();
    {
      using client = await lab.connect();
      expect(client.identity).toEqual({ protocol: KEEPER_VERSION, version: "1.2.3", build: "today" });
      await put(client, "vf/0", "first", 3);
      await put(client, "pf/0", "a PF");
      expect(await look(client, "vf/0")).toEqual({ record: "first", signals: { "fd.0": 1, "fd.1": 2, "fd.2": 3 } });
      expect(await client.list()).toEqual(["vf/0", "pf/0"]);
    }
    using next = await lab.connect();
    expect(await look(next, "vf/0")).toEqual({ record: "first", signals: { "fd.0": 1, "fd.1": 2, "fd.2": 3 } });
    await put(next, "vf/0", "second", 1);
    expect(await look(next, "vf/0")).toEqual({ record: "second", signals: { "fd.0": 1 } });
    expect(lab.store.totals).toMatchObject({ records: 2, fds: 1 });
    await next.delete("vf/0");
    await next.delete("vf/0");
    expect(await next.get("vf/0")).toBeUndefined();
    expect(await next.list()).toEqual(["pf/0"]);
  });

  test("of more bytes and fds than a message takes, several under way at once", async () => {
    await using lab = await KeeperLab.create();
    using client = await lab.connect();
    const records = [700_000, 3, 200_000].map((size) => String.fromCharCode(97 + (size % 26)).repeat(size));
    await Promise.all(records.map((record, index) => put(client, `vf/${index}`, record, [500, 0, 241][index]!)));
    for (const [index, record] of records.entries()) {
      const stored = await look(client, `vf/${index}`);
      expect(stored?.record === record).toBe(true);
      expect(Object.values(stored!.signals)).toEqual(Array.from({ length: [500, 0, 241][index]! }, (_, i) => i + 1));
    }
    const keys = Array.from({ length: 3000 }, (_, index) => `${"k".repeat(100)}/${index}`);
    await Promise.all(keys.map((key) => put(client, key, "")));
    expect((await client.list()).slice(3)).toEqual(keys);
  });

  test("beyond a limit are refused with the reason, and of others nothing is lost", async () => {
    const limits = {
      ...STORE_LIMITS,
      records: 3,
      recordSize: 100_000,
      totalSize: 150_000,
      recordFds: 300,
      totalFds: 400,
    };
    await using lab = await KeeperLab.create(limits);
    using client = await lab.connect();
    await put(client, "a", "here", 299);
    await put(client, "b", "x".repeat(90_000));
    const refused = async (key: string, record: string, fds = 0) => {
      const error = await rejection(put(client, key, record, fds));
      expect(error).toMatchObject({ code: "keeperStore" });
      return error.message;
    };
    expect(await refused("d", "y".repeat(99_990))).toMatch(/bytes of the record d: 100\d\d\d, at most 100000/);
    expect(await refused("d", "y".repeat(900_000))).toMatch(/bytes of the record d/);
    expect(await refused("d", "", 301)).toMatch(/fds of the record d: 301, at most 300/);
    expect(await refused("c", "y".repeat(70_000))).toMatch(/bytes of all records with c/);
    expect(await refused("c", "", 150)).toMatch(/fds of all records with c: 449, at most 400/);
    await put(client, "c", "");
    expect(await refused("d", "")).toMatch(/records: 4, at most 3/);
    expect(await look(client, "a")).toMatchObject({ record: "here" });
    expect(lab.store.totals).toMatchObject({ records: 3, fds: 299 });
    // In the place of one that is there it is not more.
    await put(client, "b", "z".repeat(99_000));
  });

  test("that are refused leave nothing of the earlier one, in one part or several, as a whole or changed", async () => {
    await using lab = await KeeperLab.create();
    using client = await lab.connect();
    await put(client, "b", "stays", 2);
    for (const size of [STORE_LIMITS.recordSize, 2 * STORE_LIMITS.recordSize]) {
      await put(client, "a", "earlier", 2);
      expect(await rejection(put(client, "a", "x".repeat(size), 1))).toMatchObject({ code: "keeperStore" });
      expect(await client.get("a")).toBeUndefined();
    }
    expect(await client.list()).toEqual(["b"]);
    expect(lab.store.totals).toMatchObject({ records: 1, fds: 2 });
  });

  test("that change keep the fds that stay, whatever number those have that come", async () => {
    await using lab = await KeeperLab.create();
    using client = await lab.connect();
    using open = new DisposableStack();
    const [one, two, three] = [1, 2, 3].map((times) => open.use(signalled(times)));
    const putFds = (fds: Record<string, OwnedFd>, record = "a record") =>
      client.put("vf/0", () => ({ record, fds: new Map(Object.entries(fds).map(([name, fd]) => [name, fd.number])) }));
    const stored = () => lab.store.get("vf/0")!.fds;
    await putFds({ one: one!, two: two!, three: three! });
    const [first, , third] = stored();
    const { number } = two!;
    two![Symbol.dispose]();
    using four = signalled(4);
    expect(four.number).toBe(number);
    await putFds({ three: three!, four, one: one!, again: one! }, "another one");
    expect([stored()[0] === third, stored()[2] === first]).toEqual([true, true]);
    const signals = { three: 3, four: 4, one: 1, again: 1 };
    expect(await look(client, "vf/0")).toEqual({ record: "another one", signals });
    expect(lab.store.totals).toMatchObject({ fds: 4 });
    // Of those that are under way at once none knows what the one before it comes to.
    const tooMuch = rejection(putFds({ one: one! }, "x".repeat(STORE_LIMITS.recordSize)));
    await Promise.all([
      putFds({ four, one: one! }),
      tooMuch,
      putFds({ one: one!, three: three! }),
      putFds({ three: three!, four }),
    ]);
    expect(await look(client, "vf/0")).toMatchObject({ signals: { three: 3, four: 4 } });
    await rejection(putFds({ one: one! }, "x".repeat(STORE_LIMITS.recordSize)));
    await putFds({ four });
    await client.delete("vf/0");
    await putFds({ one: one!, four });
    expect(await look(client, "vf/0")).toMatchObject({ signals: { one: 1, four: 4 } });
  });

  test("of which a part is missing when the client goes are as they were", async () => {
    await using lab = await KeeperLab.create();
    using client = await lab.connect();
    await put(client, "vf/0", "before", 2);
    client[Symbol.dispose]();
    const half = await greeted(lab);
    using fd = eventfd();
    await half.send(message("put", { key: "vf/0", flags: HeaderFlag.more, payload: new Uint8Array(64 << 10) }), [
      fd.number,
    ]);
    half[Symbol.dispose]();
    using next = await lab.connect();
    expect(await look(next, "vf/0")).toMatchObject({ record: "before" });
  });
});

test("which sockets can be read is told, and of nothing else", async () => {
  await using lab = await KeeperLab.create();
  using client = await lab.connect();
  using stack = new DisposableStack();
  const [ours, theirs] = socketPair();
  const [ended, end] = socketPair();
  const other = stack.use(signalled(1));
  stack.use(ours);
  const fds = [theirs, end, other].map((fd, index) => [`${index}`, fd.number] as const);
  await client.put("vf/0", () => ({ record: null, fds: new Map(fds) }));
  theirs[Symbol.dispose]();
  end[Symbol.dispose]();
  const places = [...[0, 1, 2, 3].map((index) => ["vf/0", index] as const), ["vf/1", 0] as const];
  const ask = () => client.readable(places);
  expect(await ask()).toEqual([false, false, undefined, undefined, undefined]);
  using talking = new MessageSocket(ours.dup(), { headerSize: 1, maxFds: 0, bodySize: () => 0 });
  await talking.send(Uint8Array.of(1));
  ended[Symbol.dispose]();
  await soon().poll(async () => (await ask())[1] || undefined, 1);
  expect(await ask()).toEqual([true, true, undefined, undefined, undefined]);
});

test("a question may be longer than a message", async () => {
  await using lab = await KeeperLab.create();
  using client = await lab.connect();
  const [ours, theirs] = socketPair();
  await client.put("vf/0", () => ({ record: 0, fds: new Map([["connection", theirs.number]]) }));
  theirs[Symbol.dispose]();
  const places = Array.from({ length: 9000 }, (_, index) => ["vf/0", index % 2] as const);
  expect(await client.readable(places)).toEqual(places.map(([, index]) => (index === 0 ? false : undefined)));
  ours[Symbol.dispose]();
});

test("a put that cannot be sent fails alone", async () => {
  await using lab = await KeeperLab.create();
  using client = await lab.connect();
  const gone = eventfd();
  const { number } = gone;
  gone[Symbol.dispose]();
  const [failed, keys] = await Promise.all([
    rejection(client.put("a", () => ({ record: 0, fds: new Map([["gone", number]]) }))),
    client.list(),
  ]);
  expect(failed).toMatchObject({ number: 9 });
  expect(keys).toEqual([]);
  for (const key of ["k".repeat(257), "\ud800"]) {
    expect(await rejection(client.put(key, () => ({ record: 0, fds: new Map() })))).toMatchObject({ code: "invalid" });
  }
  await put(client, "\ufeffa", "with a mark");
  expect(await client.list()).toEqual(["\ufeffa"]);
});

describe("a keeper that makes no sense is hung up on, and leaves no fd:", () => {
  const hello = (id: number) => answer(id, "hello", encodeJson({ protocol: KEEPER_VERSION, version: "", build: "" }));
  test.each([
    ["a list with fds", (id: number) => [answer(id, "list", encodeJson([]))], "protocol"],
    ["a refusal with fds", (id: number) => [answer(id, "list", encodeJson({}), HeaderFlag.error)], "protocol"],
    ["another answer", (id: number) => [answer(id + 1, "list", encodeJson([]))], "protocol"],
  ] as const)("%s", async (_, answers) => {
    await using lab = await KeeperLab.create();
    using listener = listenUnix(`${lab.path}2`, 0o600);
    using fd = eventfd();
    const connecting = KeeperClient.connect(`${lab.path}2`, soon());
    using keeper = new MessageSocket(accept(listener.number)!, KEEPER_FRAMING);
    const ask = async () => {
      using message = await keeper.receive();
      return HEADER.read(message!.header).id;
    };
    await keeper.send(hello(await ask()));
    using client = await connecting;
    const asked = rejection(client.list());
    for (const bytes of answers(await ask())) await keeper.send(bytes, [fd.number]);
    expect(await asked).toMatchObject({ code: "connectionLost" });
    expect(await soon().race(client.lost)).toMatchObject({ code: "protocol" });
  });
});

describe("clients", () => {
  test("that are done with it have not lost it", async () => {
    await using lab = await KeeperLab.create();
    const client = await lab.connect();
    let lost = false;
    void client.lost.then(() => {
      lost = true;
    });
    client[Symbol.dispose]();
    await Bun.sleep(5);
    expect(lost).toBe(false);
  });

  test("wait while too many others are there", async () => {
    await using lab = await KeeperLab.create();
    const silent = Array.from({ length: 16 }, () => lab.dial());
    const waiting = lab.connect();
    await Bun.sleep(50);
    for (const socket of silent) socket[Symbol.dispose]();
    using client = await waiting;
    expect(await client.list()).toEqual([]);
  });

  test("are served one at a time: the next one when the first has gone", async () => {
    await using lab = await KeeperLab.create();
    const first = await lab.connect();
    const error = await rejection(lab.connect(soon(50)));
    expect(error).toMatchObject({ code: "busy", message: expect.stringContaining(`process ${process.pid}`) });
    const waiting = lab.connect();
    await put(first, "a", "still served");
    first[Symbol.dispose]();
    using next = await waiting;
    expect(await next.list()).toEqual(["a"]);
  });

  test("that break the protocol are hung up on, and nothing is lost", async () => {
    await using lab = await KeeperLab.create();
    {
      using client = await lab.connect();
      await put(client, "vf/0", "kept", 2);
    }
    const begun = message("put", { key: "vf/1", flags: HeaderFlag.more, payload: new Uint8Array(64 << 10) });
    const wrong: Readonly<Record<string, readonly Uint8Array[]>> = {
      "an answer": [message("list", { flags: HeaderFlag.reply })],
      "no such command": [raw({ command: 77 })],
      "a key that is none": [raw({ command: Command.delete, keySize: 1, bodySize: 1 }, Uint8Array.of(0xff))],
      "a key that is too long": [raw({ command: Command.delete, keySize: 300, bodySize: 300 }, new Uint8Array(300))],
      "a key beyond its body": [raw({ command: Command.delete, keySize: 10, bodySize: 2 }, new Uint8Array(2))],
      "a body that is too long": [raw({ command: Command.put, bodySize: 1 << 30 })],
      "no key": [message("put", { payload: encodePlaces([], NOTHING) })],
      "another record in the middle of one": [begun, message("put", { key: "vf/2" })],
      "another command in the middle of one": [begun, message("list", {})],
      "hello twice": [message("hello", { payload: encodeJson({ protocol: KEEPER_VERSION }) })],
      "a part that is not full": [message("put", { key: "vf/1", flags: HeaderFlag.more })],
      "places that are not all there": [message("put", { key: "vf/0", payload: Uint8Array.of(1, 0, 0, 0) })],
      "a place beyond the fds": [message("put", { key: "vf/0", payload: encodePlaces([2], NOTHING) })],
      "an fd that stays twice": [message("put", { key: "vf/0", payload: encodePlaces([0, 0], NOTHING) })],
      "an fd that did not come": [message("put", { key: "vf/0", payload: encodePlaces([0, NEW_FD], NOTHING) })],
      "no delivery": [message("deliver", { key: "vf/0", payload: new Uint8Array(DELIVERY.size - 1) })],
      "a reply that is not all there": [
        message("deliver", { key: "vf/0", payload: DELIVERY.encode({ place: 0, take: 0, replySize: 1 }) }),
      ],
      "a delivery that stores something else": [
        message("deliver", { key: "vf/0", payload: DELIVERY.encode({ place: 0, take: 0, replySize: 0, stores: 3 }) }),
      ],
      "no JSON": [message("readable", { payload: Uint8Array.of(123) })],
      "no list": [message("readable", { payload: encodeJson({}) })],
    };
    for (const [what, messages] of Object.entries(wrong)) {
      using socket = await greeted(lab);
      for (const bytes of messages) await socket.send(bytes);
      expect([what, await hangsUp(socket)]).toEqual([what, true]);
    }
    using early = lab.dial();
    await early.send(message("list", {}));
    expect(await hangsUp(early)).toBe(true);
    {
      using greedy = await greeted(lab);
      using fd = eventfd();
      const fds = Array.from({ length: 250 }, () => fd.number);
      await greedy.send(message("put", { key: "vf/1" }), fds);
      expect(await hangsUp(greedy)).toBe(true);
      using lavish = await greeted(lab);
      await lavish.send(message("put", { key: "vf/0", payload: encodePlaces([0], NOTHING) }), [fd.number]);
      expect(await hangsUp(lavish)).toBe(true);
    }
    using client = await lab.connect();
    expect(await client.list()).toEqual(["vf/0"]);
    expect(await look(client, "vf/0")).toEqual({ record: "kept", signals: { "fd.0": 1, "fd.1": 2 } });
  });

  test("of another protocol are told so", async () => {
    await using lab = await KeeperLab.create();
    using socket = lab.dial();
    await socket.send(message("hello", { payload: encodeJson({ protocol: KEEPER_VERSION + 1 }) }));
    using answer = await socket.receive();
    expect(HEADER.read(answer!.header).flags).toBe(HeaderFlag.reply | HeaderFlag.error);
    expect(Buffer.from(answer!.body).toString()).toContain(
      `speaks version ${KEEPER_VERSION + 1}, this keeper ${KEEPER_VERSION}`,
    );
  });

  test("hear that their keeper is gone, and what was under way fails", async () => {
    const lab = await KeeperLab.create();
    using client = await lab.connect();
    const asked = rejection(client.list());
    await lab[Symbol.asyncDispose]();
    expect(await soon().race(client.lost)).toMatchObject({ code: "connectionLost" });
    expect(await asked).toMatchObject({ code: "connectionLost" });
    expect(await rejection(client.list())).toMatchObject({ code: "connectionLost" });
  });

  test("do not wait for ever for one that says nothing", async () => {
    await using lab = await KeeperLab.create();
    using listener = listenUnix(`${lab.path}2`, 0o600);
    expect(listener.closed).toBe(false);
    expect(await rejection(KeeperClient.connect(`${lab.path}2`, soon(50)))).toMatchObject({ code: "timedOut" });
    expect(await rejection(KeeperClient.connect(`${lab.path}3`, soon(50)))).toMatchObject({ number: 2 });
  });
});

function message(
  command: keyof typeof Command,
  { key = "", flags = 0, payload = new Uint8Array(0) }: { key?: string; flags?: number; payload?: Uint8Array },
): Uint8Array {
  return encodeMessage({ id: 7, command: Command[command], flags, key, payload });
}

function raw(fields: Parameters<typeof HEADER.encode>[0], body = new Uint8Array(0)): Uint8Array {
  return Buffer.concat([HEADER.encode({ id: 7, ...fields }), body]);
}

/** One that has said hello, and is served. */
async function greeted(lab: KeeperLab): Promise<MessageSocket> {
  for (;;) {
    const socket = lab.dial();
    await socket.send(message("hello", { payload: encodeJson({ protocol: KEEPER_VERSION }) }));
    using answer = await socket.receive();
    if (HEADER.read(answer!.header).flags === HeaderFlag.reply) return socket;
    socket[Symbol.dispose]();
    await Bun.sleep(1);
  }
}

async function hangsUp(socket: MessageSocket): Promise<boolean> {
  using answer = await soon().race(socket.receive());
  return answer === undefined;
}

function answer(id: number, command: keyof typeof Command, payload: Uint8Array, flags = 0): Uint8Array {
  return encodeMessage({ id, command: Command[command], flags: HeaderFlag.reply | flags, key: "", payload });
}
