import { afterEach, beforeEach, describe, expect, test } from "bun:test";
import { existsSync, mkdtempSync, readdirSync, rmSync, statSync, writeFileSync } from "node:fs";
import { connect, type Socket } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import Type from "typebox";
import { Deadline } from "../../src/base/deadline.ts";
import { VhostdError } from "../../src/base/errors.ts";
import { silentLogger } from "../../src/base/log.ts";
import { RpcClient } from "../../src/rpc/client.ts";
import { withDiscovery } from "../../src/rpc/discover.ts";
import { defineMethod } from "../../src/rpc/method.ts";
import { RpcServer } from "../../src/rpc/server.ts";
import { rejection } from "../kit/rejection.ts";

const soon = () => Deadline.after(5000, "the test");
const openFds = () => readdirSync("/proc/self/fd").length;

let directory: string;
let path: string;
let server: RpcServer;
let fdsBefore: number;
let publish: ((text: string) => void) | undefined;
let subscribersClosed: number;

const methods = withDiscovery({ title: "test", version: "1" }, [
  defineMethod({
    name: "echo",
    summary: "Answers what it is given, after a while.",
    params: Type.Object({ text: Type.String(), after: Type.Optional(Type.Number()) }, { additionalProperties: false }),
    result: Type.Object({ text: Type.String() }),
    async handler({ text, after = 0 }) {
      if (after > 0) await Bun.sleep(after);
      return { text };
    },
  }),
  defineMethod({
    name: "fail",
    summary: "Fails.",
    params: Type.Object({}),
    result: Type.Null(),
    handler() {
      throw new VhostdError("vfNotFound", "no VF 0000:5a:00.1", { fix: "add it" });
    },
  }),
  defineMethod({
    name: "crash",
    summary: "Has a bug.",
    params: Type.Object({}),
    result: Type.Null(),
    handler(): null {
      throw new TypeError("undefined is not a function");
    },
  }),
  defineMethod({
    name: "big",
    summary: "Answers a lot.",
    params: Type.Object({ bytes: Type.Integer() }),
    result: Type.String(),
    handler: ({ bytes }) => "x".repeat(bytes),
  }),
  defineMethod({
    name: "subscribe",
    summary: "Sends notifications.",
    params: Type.Object({}),
    result: Type.Boolean(),
    handler(_, call) {
      publish = (text) => call.notify("event", { text });
      call.onClose(() => subscribersClosed++);
      return true;
    },
  }),
]);

async function startServer(limits: ConstructorParameters<typeof RpcServer>[1]["limits"] = {}): Promise<void> {
  server = new RpcServer(methods, { log: silentLogger, limits: { partialTimeout: 300, sendTimeout: 300, ...limits } });
  await server.listenUnix(path, 0o600);
}

beforeEach(() => {
  fdsBefore = openFds();
  directory = mkdtempSync(join(tmpdir(), "vhostd-rpc-"));
  path = join(directory, "rpc.sock");
  publish = undefined;
  subscribersClosed = 0;
});

afterEach(async () => {
  await server.stop(1000);
  expect(existsSync(path)).toBe(false);
  rmSync(directory, { recursive: true });
  await soon().poll(() => (openFds() <= fdsBefore ? true : undefined), 10);
});

/** A client without manners: bytes out, lines in. */
class RawClient implements Disposable {
  readonly socket: Socket;
  private text = "";
  closed = false;

  constructor() {
    this.socket = connect({ path });
    this.socket.on("data", (chunk: Uint8Array) => {
      this.text += new TextDecoder().decode(chunk);
    });
    this.socket.on("close", () => {
      this.closed = true;
    });
    this.socket.on("error", () => {});
  }

  send(text: string | Uint8Array): this {
    this.socket.write(text);
    return this;
  }

  async answers(
    count: number,
  ): Promise<{ id: unknown; result?: unknown; error?: { code: number; message: string } }[]> {
    return await soon().poll(() => {
      const lines = this.text.split("\n").slice(0, -1);
      return lines.length >= count ? lines.map((line) => JSON.parse(line)) : undefined;
    }, 2);
  }

  async untilClosed(): Promise<void> {
    await soon().poll(() => (this.closed ? true : undefined), 5);
  }

  [Symbol.dispose](): void {
    this.socket.destroy();
  }
}

const echo = (id: number | string, text = "hello", more = {}) =>
  JSON.stringify({ jsonrpc: "2.0", id, method: "echo", params: { text, ...more } });

async function expectServes(): Promise<void> {
  using client = await RpcClient.connect(path, soon());
  expect(await client.call("echo", { text: "still here" }, soon())).toEqual({ text: "still here" });
}

describe("a stream without framing", () => {
  beforeEach(() => startServer());

  test("a request in single bytes", async () => {
    using client = new RawClient();
    for (const byte of new TextEncoder().encode(echo(1, "päckchen"))) {
      client.send(Uint8Array.of(byte));
      await Bun.sleep(0);
    }
    expect(await client.answers(1)).toEqual([{ jsonrpc: "2.0", id: 1, result: { text: "päckchen" } } as never]);
  });

  test("many requests in one packet are answered in their order", async () => {
    using client = new RawClient();
    const ids = Array.from({ length: 500 }, (_, i) => i);
    client.send(ids.map((id) => echo(id, "x", id === 0 ? { after: 20 } : {})).join(""));
    expect((await client.answers(500)).map(({ id }) => id)).toEqual(ids);
  });

  test("a client that ends its side gets its answers first", async () => {
    using client = new RawClient();
    client.socket.end(echo(1, "a", { after: 30 }) + echo(2, "b"));
    expect(await client.answers(2)).toHaveLength(2);
    await client.untilClosed();
  });

  test("a notification gets no answer, not even when it fails", async () => {
    using client = new RawClient();
    client.send(`{"jsonrpc":"2.0","method":"fail"}{"jsonrpc":"2.0","method":"nothing"}${echo(7)}`);
    expect((await client.answers(1)).map(({ id }) => id)).toEqual([7]);
  });

  const refused: [string, string, number, string][] = [
    ["malformed JSON", "{nonsense}", -32700, "not JSON"],
    ["bytes that are not UTF-8", "\xff", -32700, "not JSON"],
    ["a batch", "[]", -32600, "one after the other"],
    ["another protocol version", `{"method":"echo","id":1}`, -32600, `"jsonrpc" is missing`],
    ["no method", `{"jsonrpc":"2.0","id":1}`, -32600, `"method" is missing`],
    ["an id of a wrong type", `{"jsonrpc":"2.0","id":{},"method":"echo"}`, -32600, `"id" is {}`],
    ["an unknown method", `{"jsonrpc":"2.0","id":1,"method":"toString"}`, -32601, `no method "toString"`],
    ["a missing parameter", `{"jsonrpc":"2.0","id":1,"method":"echo"}`, -32602, `parameter "text" is missing`],
    ["an error of the operation", `{"jsonrpc":"2.0","id":1,"method":"fail"}`, -1003, "no VF 0000:5a:00.1"],
    ["a bug in a handler", `{"jsonrpc":"2.0","id":1,"method":"crash"}`, -32603, "internal error"],
  ];
  for (const [what, text, code, message] of refused) {
    test(`${what}: an error, and the connection goes on`, async () => {
      using client = new RawClient();
      client.send(text === "\xff" ? Uint8Array.from([0x7b, 0x22, 0xff, 0x22, 0x7d]) : text).send(echo(2));
      const [error, answer] = await client.answers(2);
      expect(error?.error?.code).toBe(code);
      expect(error?.error?.message).toContain(message);
      expect(answer?.result).toEqual({ text: "hello" });
    });
  }

  const fatal: [string, () => string, string][] = [
    ["a huge message", () => `{"a":"${"x".repeat(8 << 20)}"}`, "longer than 1048576 bytes"],
    ["a deeply nested message", () => "[".repeat(100_000), "deeper than 64"],
    ["HTTP", () => "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", "begins with byte 0x47"],
  ];
  for (const [what, text, message] of fatal) {
    test(`${what}: an error, and the connection ends`, async () => {
      using client = new RawClient();
      client.send(text());
      expect((await client.answers(1))[0]?.error?.message).toContain(message);
      await client.untilClosed();
      await expectServes();
    });
  }

  test("a message that is never completed, though bytes keep coming", async () => {
    using client = new RawClient();
    client.send(`{"jsonrpc":`);
    const drip = setInterval(() => client.send(" "), 20);
    try {
      expect((await client.answers(1))[0]?.error?.message).toContain("not complete within 300 ms");
      await client.untilClosed();
    } finally {
      clearInterval(drip);
    }
  });

  test("a client that hangs up while its call is carried out", async () => {
    using client = new RawClient();
    client.send(echo(1, "x", { after: 50 }));
    await soon().poll(() => (server.clients === 1 ? true : undefined), 2);
    client.socket.destroy();
    await soon().poll(() => (server.clients === 0 ? true : undefined), 5);
    await expectServes();
  });
});

describe("many and slow clients", () => {
  test("one that never reads is cut off, others are served meanwhile", async () => {
    await startServer();
    using deaf = new RawClient();
    deaf.socket.pause();
    for (let id = 0; id < 20; id++) {
      deaf.send(JSON.stringify({ jsonrpc: "2.0", id, method: "big", params: { bytes: 1 << 20 } }));
    }
    await soon().poll(() => (server.clients === 1 ? true : undefined), 2);
    await expectServes();
    await soon().poll(() => (server.clients === 0 ? true : undefined), 10);
  });

  test("a subscriber that never reads is cut off, others get every event", async () => {
    await startServer({ unsent: 1 << 16 });
    using deaf = new RawClient();
    deaf.send(`{"jsonrpc":"2.0","id":1,"method":"subscribe"}`);
    await deaf.answers(1);
    deaf.socket.pause();
    const tellDeaf = publish!;
    using client = await RpcClient.connect(path, soon());
    const heard: unknown[] = [];
    client.onNotification((method, params) => heard.push([method, params]));
    await client.call("subscribe", {}, soon());
    const tellClient = publish!;
    const text = "x".repeat(1 << 14);
    for (let i = 0; i < 100; i++) {
      tellDeaf(text);
      tellClient(text);
      await Bun.sleep(0);
    }
    await soon().poll(() => (subscribersClosed === 1 && heard.length === 100 ? true : undefined), 5);
    expect(heard[99]).toEqual(["event", { text }]);
  });

  test("250 connections at once, each with a call", async () => {
    await startServer();
    const clients = await Promise.all(Array.from({ length: 250 }, () => RpcClient.connect(path, soon())));
    try {
      const answers = await Promise.all(
        clients.map((client, i) => client.call("echo", { text: `${i}`, after: 20 }, soon())),
      );
      expect(answers).toEqual(clients.map((_, i) => ({ text: `${i}` })));
      expect(server.clients).toBe(250);
    } finally {
      for (const client of clients) client[Symbol.dispose]();
    }
  });

  test("one more than the limit is told so", async () => {
    await startServer({ clients: 2 });
    using one = await RpcClient.connect(path, soon());
    using two = await RpcClient.connect(path, soon());
    await Promise.all([one, two].map((client) => client.call("echo", { text: "" }, soon())));
    using three = await RpcClient.connect(path, soon());
    expect(await rejection(three.call("echo", { text: "" }, soon()))).toMatchObject({ code: "limitExceeded" });
    expect(await one.call("echo", { text: "fine" }, soon())).toEqual({ text: "fine" });
  });
});

describe("the listening socket", () => {
  test("has the permissions asked for, and the umask is as before", async () => {
    const umask = process.umask();
    await startServer();
    expect(statSync(path).mode & 0o777).toBe(0o600);
    expect(process.umask()).toBe(umask);
  });

  test("a socket file whose process is gone is replaced", async () => {
    const script = `require("node:net").createServer().listen(${JSON.stringify(path)}, () => process.kill(process.pid, "SIGKILL"))`;
    await Bun.spawn([process.execPath, "-e", script]).exited;
    expect(existsSync(path)).toBe(true);
    await startServer();
    await expectServes();
  });

  test("one that is alive is not", async () => {
    await startServer();
    const second = new RpcServer(methods, { log: silentLogger });
    expect(await rejection(second.listenUnix(path, 0o600))).toMatchObject({ number: 98 });
    await expectServes();
  });

  test("a file that is no socket is left alone", async () => {
    await startServer();
    const file = join(directory, "precious");
    writeFileSync(file, "");
    expect(await rejection(server.listenUnix(file, 0o600))).toMatchObject({ code: "exists" });
    expect(existsSync(file)).toBe(true);
  });

  test("TCP serves the same methods", async () => {
    await startServer();
    const port = await server.listenTcp({ host: "127.0.0.1", port: 0 });
    const socket = connect({ host: "127.0.0.1", port });
    const { promise, resolve } = Promise.withResolvers<string>();
    socket.on("data", (chunk: Uint8Array) => resolve(new TextDecoder().decode(chunk)));
    socket.write(echo(1));
    expect(JSON.parse(await soon().race(promise))).toMatchObject({ id: 1, result: { text: "hello" } });
    socket.destroy();
  });

  test("stop lets the call in progress end, takes no other, and closes idle connections", async () => {
    await startServer();
    using idle = new RawClient();
    using busy = new RawClient();
    busy.send(echo(1, "in progress", { after: 100 }) + echo(2, "behind it"));
    await soon().poll(() => (server.clients === 2 ? true : undefined), 2);
    await Bun.sleep(20);
    await server.stop(2000);
    await idle.untilClosed();
    await busy.untilClosed();
    expect((await busy.answers(1)).map(({ id }) => id)).toEqual([1]);
  });
});

describe("RpcClient", () => {
  test("nobody listens: an error with errno and fix", async () => {
    await startServer();
    expect(await rejection(RpcClient.connect(join(directory, "none"), soon()))).toMatchObject({
      number: 2,
      fix: expect.stringContaining("start the daemon"),
    });
  });

  test("a server that dies in the middle of a call rejects it at once", async () => {
    await startServer();
    using client = await RpcClient.connect(path, soon());
    const call = client.call("echo", { text: "", after: 200 }, soon());
    await soon().poll(() => (server.clients === 1 ? true : undefined), 2);
    void server.stop(0);
    expect(await rejection(call)).toMatchObject({
      code: "connectionLost",
      message: expect.stringContaining("before it answered echo"),
    });
    expect(await rejection(client.call("echo", { text: "" }, soon()))).toMatchObject({ code: "connectionLost" });
    await Bun.sleep(200);
  });

  test("a server that does not answer in time", async () => {
    await startServer();
    using client = await RpcClient.connect(path, soon());
    const call = client.call("echo", { text: "late", after: 200 }, Deadline.after(50, "echo"));
    expect(await rejection(call)).toMatchObject({ code: "timedOut" });
    expect(await client.call("echo", { text: "next" }, soon())).toEqual({ text: "next" });
  });

  test("rpc.discover describes every method, itself too", async () => {
    await startServer();
    using client = await RpcClient.connect(path, soon());
    const document = (await client.call("rpc.discover", {}, soon())) as { methods: { name: string }[] };
    expect(document.methods.map(({ name }) => name)).toEqual([
      "echo",
      "fail",
      "crash",
      "big",
      "subscribe",
      "rpc.discover",
    ]);
  });
});
