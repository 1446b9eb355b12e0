import { afterEach, describe, expect, test } from "bun:test";
import fc from "fast-check";
import { Deadline } from "../../../src/base/deadline.ts";
import { duplicate, liveFds } from "../../../src/native/fd.ts";
import { memfd, socketPair } from "../../../src/native/sys.ts";
import { VfioUserClient } from "../../../src/pci/vfio-user/client.ts";
import { encodeMessage } from "../../../src/vfio-user/framing.ts";
import { Command, HEADER, HeaderFlag, VERSION } from "../../../src/vfio-user/messages.ts";
import { decodeVersion, encodeVersion } from "../../../src/vfio-user/version.ts";
import { rejection } from "../../kit/rejection.ts";
import { type Answer, ScriptedServer } from "./scripted-server.ts";

const soon = (ms = 1000) => Deadline.after(ms, "the test");
const undo: Disposable[] = [];
afterEach(async () => {
  for (const one of undo.splice(0).reverse()) one[Symbol.dispose]();
  await soon().poll(() => liveFds() === 0 || undefined, 1);
});

async function connect(prepare: (server: ScriptedServer) => void = () => {}) {
  const [near, far] = socketPair();
  const server = new ScriptedServer(far);
  undo.push(server);
  prepare(server);
  const client = await VfioUserClient.over(near, "the server", soon());
  undo.push(client);
  return { client, server };
}

const EMPTY = new Uint8Array(0);
const limits = { maxMsgFds: 1, maxDataTransfer: 4096, maxDmaMaps: 1, pageSizes: 4096, kickFds: 0, queueStats: 0 };

describe("the version", () => {
  test("is agreed on, with the server's capabilities", async () => {
    const { client, server } = await connect();
    expect(client.capabilities.maxMsgFds).toBe(8);
    const { major, minor, capabilities } = decodeVersion(server.requests[0]!.body);
    expect([major, minor]).toEqual([0, 1]);
    expect(capabilities.maxMsgFds).toBeGreaterThan(8);
  });

  test("has defaults where the server says nothing", () => {
    const { capabilities } = decodeVersion(VERSION.encode({ major: 0, minor: 1 }));
    expect(capabilities).toEqual({
      maxMsgFds: 1,
      maxDataTransfer: 1 << 20,
      maxDmaMaps: 65535,
      pageSizes: 4096,
      kickFds: 0,
      queueStats: 0,
    });
  });

  test("names an extension only where there is one", () => {
    const said = (more: object) => encodeVersion({ major: 0, minor: 1, capabilities: { ...limits, ...more } });
    expect(new TextDecoder().decode(said({}))).not.toContain("vfe_");
    for (const extension of [{ kickFds: 1 }, { queueStats: 1 }, { kickFds: 1, queueStats: 1 }]) {
      expect(decodeVersion(said(extension)).capabilities).toEqual({ ...limits, ...extension });
    }
  });

  const text = (json: string) => Uint8Array.of(0, 0, 1, 0, ...new TextEncoder().encode(json));
  const bad: [string, Uint8Array, RegExp][] = [
    ["cut short", Uint8Array.of(0, 0, 1), /3 bytes/],
    ["of another major", encodeVersion({ major: 1, minor: 0, capabilities: limits }), /1\.0/],
    ["newer than proposed", encodeVersion({ major: 0, minor: 2, capabilities: limits }), /0\.2/],
    ["no JSON", text("{"), /not JSON/],
    ["no object", text("[1]"), /not a JSON object/],
    ["with a text for a number", text('{"capabilities":{"max_msg_fds":"8"}}'), /max_msg_fds is of type string/],
    [
      "with a value without end",
      text(`{"capabilities":{"pgsizes":${"[".repeat(1500)}${"]".repeat(1500)}}}`),
      /of type object/,
    ],
    ["too long", text(" ".repeat(5000)), /5004 bytes; at most 4096/],
    ["with a negative number", text('{"capabilities":{"max_data_xfer_size":-1}}'), /max_data_xfer_size is -1/],
    ["with an extension of another meaning", text('{"capabilities":{"vfe_kick_fds":2}}'), /vfe_kick_fds is 2; 0 to 1/],
    ["no UTF-8", Uint8Array.of(0, 0, 1, 0, 0xff, 0xfe), /not JSON/],
  ];
  test.each(bad)("%s is refused and the connection closed", async (_, body, message) => {
    let server: ScriptedServer | undefined;
    const refused = connect((one) => {
      server = one;
      one.script.set(Command.version, () => ({ body }));
    });
    expect((await rejection(refused)).message).toMatch(message);
    await server?.ended;
  });
});

describe("requests", () => {
  test("may be under way together and are matched by id, in whatever order they are answered", async () => {
    const { client, server } = await connect();
    const parked: (() => void)[] = [];
    server.script.set(Command.regionRead, async ({ body }) => {
      await new Promise<void>((resolve) => parked.push(resolve));
      return { body };
    });
    const asked = [1, 2, 3].map((value) => client.request(Command.regionRead, Uint8Array.of(value)));
    await soon().poll(() => parked.length === 3 || undefined, 1);
    for (const release of parked.reverse()) release();
    const bodies = (await Promise.all(asked)).map(({ body }) => [...body]);
    expect(bodies).toEqual([[1], [2], [3]]);
    expect(server.requests.slice(1).map(({ body }) => body[0])).toEqual([1, 2, 3]);
  });

  test("carry descriptors both ways", async () => {
    const { client, server } = await connect();
    using file = memfd("file", 4096);
    server.script.set(Command.dmaMap, ({ fds }) => ({ fds: fds.map(({ number }) => number) }));
    using reply = await client.request(Command.dmaMap, EMPTY, { fds: [file.number] });
    expect(reply.fds).toHaveLength(1);
    const nine = Array.from({ length: 9 }, () => file.number);
    expect((await rejection(client.request(Command.dmaMap, EMPTY, { fds: nine }))).message).toMatch(
      /takes 8 descriptors/,
    );
  });

  test("fail with the server's errno; what is no errno is EIO", async () => {
    const { client, server } = await connect();
    for (const [errno, seen] of [
      [17, 17],
      [0, 5],
      [0xffff_ffff, 5],
    ] as const) {
      server.script.set(Command.dmaMap, () => ({ errno }));
      expect(await rejection(client.request(Command.dmaMap, EMPTY))).toMatchObject({ errno: seen });
    }
    expect(client.ended).toBeUndefined();
  });

  test("end at their deadline; a late answer is thrown away with its descriptors", async () => {
    const { client, server } = await connect();
    let release = () => {};
    server.script.set(Command.regionRead, async () => {
      await new Promise<void>((resolve) => {
        release = resolve;
      });
      return { fds: [server.doorbells[0]!.number] };
    });
    const late = client.request(Command.regionRead, EMPTY, { deadline: soon(10) });
    expect(await rejection(late)).toMatchObject({ code: "timedOut" });
    const open = liveFds();
    release();
    (await client.request(Command.reset, EMPTY))[Symbol.dispose]();
    expect(liveFds()).toBe(open);
    expect(client.ended).toBeUndefined();
  });

  test("all fail when the server is gone, and so does the next", async () => {
    const { client, server } = await connect();
    server.script.set(Command.regionRead, () => ({ silent: true }));
    const asked = Promise.allSettled([1, 2].map(() => client.request(Command.regionRead, EMPTY)));
    await soon().poll(() => server.requests.length === 3 || undefined, 1);
    server[Symbol.dispose]();
    for (const one of await asked) expect(one).toMatchObject({ reason: { code: "connectionLost" } });
    expect((await client.lost).message).toMatch(/hung up|reset/);
    expect(await rejection(client.request(Command.reset, EMPTY))).toMatchObject({ code: "connectionLost" });
  });

  test("of the server are refused, not obeyed", async () => {
    const { client, server } = await connect();
    await server.send(
      encodeMessage({ id: 7, command: Command.dmaRead, flags: HeaderFlag.noReply }, new Uint8Array(16)),
    );
    await server.send(encodeMessage({ id: 8, command: Command.dmaRead, flags: 0 }, new Uint8Array(16)));
    await soon().poll(() => server.requests.length === 2 || undefined, 1);
    const { header } = server.requests[1]!;
    expect(header).toMatchObject({ id: 8, command: Command.dmaRead, error: 95 });
    expect(header.flags).toBe(HeaderFlag.reply | HeaderFlag.error);
    expect(client.ended).toBeUndefined();
  });
});

describe("a server that breaks the protocol is hung up on", () => {
  const answers: [string, Answer, RegExp][] = [
    ["an answer that nobody asked for", { header: { id: 0x1234 } }, /4660, which was not asked/],
    ["an answer to another command", { header: { command: Command.dmaMap } }, /answered dmaMap where reset was asked/],
    ["a message of no known type", { header: { flags: 0x3 } }, /type 3/],
    ["a body larger than ever asked for", { body: new Uint8Array((1 << 20) + 8192) }, /at most/],
  ];
  test.each(answers)("%s", async (_, answer, message) => {
    const { client, server } = await connect();
    server.script.set(Command.reset, () => answer);
    expect(await rejection(client.request(Command.reset, EMPTY))).toMatchObject({ code: "connectionLost" });
    expect((await client.lost).message).toMatch(message);
  });

  test("a header that says less than itself", async () => {
    const { client, server } = await connect();
    await server.send(HEADER.encode({ id: 0, command: 1, size: 15, flags: 1 }));
    expect((await client.lost).message).toMatch(/15 bytes/);
  });
});

test("whatever a server sends, the client ends or goes on, and keeps no descriptor", async () => {
  const property = fc.asyncProperty(
    fc.array(fc.uint8Array({ minLength: 1, maxLength: 64 }), { maxLength: 8 }),
    async (blobs) => {
      const { client, server } = await connect();
      const asked = client.request(Command.reset, EMPTY, { deadline: soon(50) }).then(
        (reply) => reply[Symbol.dispose](),
        () => {},
      );
      for (const blob of blobs) await server.send(blob, [server.doorbells[0]!.number]).catch(() => {});
      server[Symbol.dispose]();
      await asked;
      await client.lost;
      expect(client.ended).toBeInstanceOf(Error);
    },
  );
  await fc.assert(property, { numRuns: 40 });
});

describe("handing over", () => {
  test("a successor goes on with the same connection and drops answers that are not its own", async () => {
    const { client, server } = await connect();
    let release = () => {};
    server.script.set(Command.regionRead, async () => {
      await new Promise<void>((resolve) => {
        release = resolve;
      });
      return { fds: [server.doorbells[0]!.number] };
    });
    const orphan = client.request(Command.regionRead, EMPTY);
    await soon().poll(() => server.requests.length === 2 || undefined, 1);
    const snapshot = JSON.parse(JSON.stringify(client.snapshot()));
    using borrowed = duplicate(client.fds.socket);
    using turns = duplicate(client.fds.turns);
    client.abandon();
    expect(await rejection(orphan)).toMatchObject({ code: "connectionLost" });

    const revived = VfioUserClient.revive(borrowed.dup(), turns.dup(), "the server", snapshot);
    undo.push(revived);
    release();
    (await revived.request(Command.reset, EMPTY))[Symbol.dispose]();
    expect(server.commands).toEqual(["version", "regionRead", "reset"]);
    expect(server.requests[2]!.header.id).toBe(0x4000);
    expect(revived.ended).toBeUndefined();
  });

  test("one that died before its record was written has left answers, too: nobody takes them for its own", async () => {
    const { client, server } = await connect();
    const parked: (() => void)[] = [];
    server.script.set(Command.regionRead, async ({ header }) => {
      await new Promise<void>((resolve) => parked.push(resolve));
      return { body: Uint8Array.of(header.id >> 14), fds: [server.doorbells[0]!.number] };
    });
    const snapshot = client.snapshot();
    const copies = () => [duplicate(client.fds.socket), duplicate(client.fds.turns)] as const;
    const lives = Array.from({ length: 5 }, copies);
    const killed = [client];
    const asked = [rejection(client.request(Command.regionRead, EMPTY))];
    for (const [socket, turns] of lives.slice(0, 4)) {
      await soon().poll(() => parked.length === asked.length || undefined, 1);
      killed.at(-1)!.abandon();
      const next = VfioUserClient.revive(socket, turns, "the server", snapshot);
      if (asked.length < 4) {
        asked.push(rejection(next.request(Command.regionRead, EMPTY)));
        killed.push(next);
        continue;
      }
      undo.push(next);
      for (const release of parked.splice(0)) release();
      // The same id as the first one's: by then its answer is there.
      (await next.request(Command.reset, EMPTY))[Symbol.dispose]();
      expect(next.ended).toBeUndefined();
    }
    for (const fd of lives[4]!) fd[Symbol.dispose]();
    expect((await Promise.all(asked)).map((error) => (error as { code?: string }).code)).toEqual(
      Array.from({ length: 4 }, () => "connectionLost"),
    );
    const ids = server.requests.slice(1).map(({ header }) => header.id);
    expect(ids).toEqual([1, 0x4000, 0x8000, 0xc000, 0]);
  });

  test("needs to know whose turn it is", () => {
    const [near, far] = socketPair();
    undo.push(far);
    const capabilities = { ...limits };
    expect(() => VfioUserClient.revive(near, memfd("turns", 0), "the server", { capabilities })).toThrow(/whose turn/);
  });
});
