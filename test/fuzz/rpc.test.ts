import { expect, test } from "bun:test";
import { mkdtempSync, rmSync } from "node:fs";
import { connect, type Socket } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import fc from "fast-check";
import { Deadline } from "../../src/base/deadline.ts";
import { silentLogger } from "../../src/base/log.ts";
import { createMethods } from "../../src/daemon/methods.ts";
import { RpcClient } from "../../src/rpc/client.ts";
import { RpcServer } from "../../src/rpc/server.ts";
import { FUZZ_TIMEOUT, fuzz } from "../kit/fuzz.ts";
import { FakeDevices } from "../unit/rpc/fake-devices.ts";

const soon = (what: string) => Deadline.after(10_000, what);
/** Milliseconds for a message that has begun to be complete. */
const PARTIAL_TIME = 50;
/** An answer that says that we are at fault, or that the operation failed; -32603 says that the server is. */
const INTERNAL_ERROR = -32603;

const METHODS = createMethods(new FakeDevices(), silentLogger).map(({ name }) => name);
const NAMES = [
  ...["device", "dev", "vfdev", "mgmtpf", "socket", "socket_file", "mode", "uuid", "server", "operation"],
  ...["add", "remove", "list", "info", "debug", "test_operation", "size_mode", "__proto__", "constructor", "toString"],
];
const TEXTS = [
  ...["0000:5a:00.0", "5a:00.1", "0000:5a:00.0", "5a:00.9", "zz:00.0", "", "client", "server", "\u0000", "/tmp/x"],
  ...["run", "quiesce", "freeze", "status", "ee8b6429-eb1e-45e7-9dab-aff843b99075", "x".repeat(5000)],
];

const value = fc.letrec((tie) => ({
  any: fc.oneof(
    { maxDepth: 3 },
    { weight: 8, arbitrary: fc.constantFrom(...TEXTS) },
    { weight: 3, arbitrary: fc.constantFrom(true, false, null, 0, -1, 1.5, 1e308, 2 ** 53) },
    { weight: 1, arbitrary: fc.string({ unit: "binary" }) },
    { weight: 1, arbitrary: fc.array(tie("any"), { maxLength: 4 }) },
    { weight: 1, arbitrary: fc.dictionary(fc.constantFrom(...NAMES), tie("any"), { maxKeys: 4 }) },
  ),
})).any;
const params = fc.oneof(
  { weight: 6, arbitrary: fc.dictionary(fc.constantFrom(...NAMES), value, { maxKeys: 4 }) },
  { weight: 1, arbitrary: value },
);

/** An object that may be a request. */
const request = fc
  .record(
    {
      jsonrpc: fc.oneof({ weight: 9, arbitrary: fc.constant("2.0") }, { weight: 1, arbitrary: value }),
      method: fc.oneof({ weight: 9, arbitrary: fc.constantFrom(...METHODS) }, { weight: 1, arbitrary: value }),
      params,
      id: fc.oneof({ weight: 9, arbitrary: fc.nat(9) }, { weight: 1, arbitrary: value }),
    },
    { requiredKeys: [] },
  )
  .map((object) => JSON.stringify(object));

/** What is no request, or no JSON, or no end of it. */
const nonsense = fc.oneof(
  fc.uint8Array({ maxLength: 60 }).map((bytes) => Buffer.from(bytes).toString("latin1")),
  fc.nat(200).map((depth) => `${'{"a":'.repeat(depth)}1${"}".repeat(depth)}`),
  fc.nat(200).map((depth) => "[".repeat(depth)),
  fc.constantFrom("{", "}", "[]", "{}", '"', "nul", '{"id":1,}', '{"id":1}{', '{"a":"\\', "GET / HTTP/1.1\r\n\r\n"),
  fc
    .constantFrom(1 << 20, (1 << 20) + 20)
    .map((size) => `{"jsonrpc":"2.0","id":1,"method":"${"x".repeat(size - 40)}"}`),
);

const piece = fc.oneof(
  { weight: 6, arbitrary: request },
  { weight: 1, arbitrary: nonsense },
  {
    weight: 1,
    arbitrary: fc.tuple(request, fc.nat(), fc.string()).map(([text, at, more]) => {
      const place = at % (text.length + 1);
      return `${text.slice(0, place)}${more}${text.slice(place)}`;
    }),
  },
);

/** All that a client sends, in the pieces in which it sends it; then it hangs up, or waits for the end. */
const client = fc.record({
  pieces: fc.array(piece, { minLength: 1, maxLength: 8 }),
  /** Bytes of each piece on the wire; 0 for all at once. */
  cut: fc.constantFrom(0, 0, 0, 1, 7, 100),
  ending: fc.constantFrom("end", "end", "wait", "destroy"),
});
type Client = typeof client extends fc.Arbitrary<infer T> ? T : never;

/** Speaks, and takes all answers until the server hangs up. @returns what was answered */
async function speak(path: string, { pieces, cut, ending }: Client): Promise<string> {
  const socket: Socket = connect({ path });
  const received: Uint8Array[] = [];
  const { promise: closed, resolve } = Promise.withResolvers<void>();
  socket.on("data", (chunk: Uint8Array) => received.push(chunk));
  socket.on("close", () => resolve());
  socket.on("error", () => {});
  const bytes = Buffer.from(pieces.join(""), "latin1");
  const step = cut === 0 || bytes.length > 10_000 ? bytes.length : cut;
  for (let at = 0; at < bytes.length && !socket.destroyed; at += step) {
    socket.write(bytes.subarray(at, at + step));
    if (cut !== 0) await new Promise(setImmediate);
  }
  if (ending === "destroy") socket.destroy();
  else if (ending === "end") socket.end();
  else {
    // A client that says no more is not hung up on: only one that is in the middle of a message.
    await Bun.sleep(2);
    socket.end();
  }
  await soon("the server's hang-up").race(closed);
  return Buffer.concat(received).toString();
}

function checkAnswers(text: string, ending: Client["ending"]): void {
  if (ending === "destroy") return;
  for (const line of text.split("\n").slice(0, -1)) {
    const answer = JSON.parse(line) as { jsonrpc: string; method?: string; error?: { code: number; message: string } };
    expect(answer.jsonrpc).toBe("2.0");
    if (answer.method !== undefined) {
      expect(answer.method).toBe("event");
      continue;
    }
    expect("result" in answer !== "error" in answer).toBe(true);
    if (answer.error === undefined) continue;
    expect(answer.error.code).not.toBe(INTERNAL_ERROR);
    expect(answer.error.message).not.toBe("");
  }
}

test(
  "whatever a client sends, it is answered or hung up on, and another one is served",
  async () => {
    const directory = mkdtempSync(join(tmpdir(), "rpc-"));
    const path = join(directory, "rpc.sock");
    const devices = new FakeDevices();
    const complaints: string[] = [];
    const log = { ...silentLogger, error: (text: string, cause?: unknown) => void complaints.push(`${text} ${cause}`) };
    const server = new RpcServer(createMethods(devices, log), { log, limits: { partialTimeout: PARTIAL_TIME } });
    await server.listenUnix(path, 0o600);
    try {
      using good = await RpcClient.connect(path, soon("a connection"));
      const property = fc.asyncProperty(fc.array(client, { minLength: 1, maxLength: 4 }), async (clients) => {
        const all = clients.map(async (one) => checkAnswers(await speak(path, one), one.ending));
        expect(await good.call("version", {}, soon("an answer to another client"))).toMatchObject({ errno: 0 });
        await Promise.all(all);
        expect(complaints).toEqual([]);
        devices.pfs.clear();
        devices.vfs.clear();
      });
      await fuzz("rpc clients", property, { batch: 20 });
      await soon("the end of all connections").poll(() => server.clients === 1 || undefined, 5);
      expect(devices.handlers.size).toBe(0);
    } finally {
      await server.stop();
      rmSync(directory, { recursive: true });
    }
  },
  FUZZ_TIMEOUT,
);
