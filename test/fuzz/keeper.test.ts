import { expect, test } from "bun:test";
import fc from "fast-check";
import { Command, DELIVERY, HEADER, HeaderFlag, KEEPER_VERSION, Stores } from "../../src/keeper/messages.ts";
import { STORE_LIMITS } from "../../src/keeper/store.ts";
import { liveFds, pendingCloses } from "../../src/native/fd.ts";
import { MessageSocket } from "../../src/native/message-socket.ts";
import { connectUnix, eventfd, shutDown } from "../../src/native/sys.ts";
import { FUZZ_TIMEOUT, fuzz } from "../kit/fuzz.ts";
import { KeeperLab, soon } from "../unit/keeper/keeper-lab.ts";

const KEPT = "vf/kept";
const LIMITS = { ...STORE_LIMITS, records: 8, recordSize: 4096, totalSize: 16_384, recordFds: 8, totalFds: 32 };
const HELLO = Buffer.from(JSON.stringify({ protocol: KEEPER_VERSION })).toString("hex");
/** Places, and a record behind them: without fds, with a new one, with the first of the earlier record, with both in turn. */
const RECORDS = ["00000000", "01000000ffffffff7b7d", "0100000000000000", "0200000000000000ffffffff"];
/** Of one byte, which is taken out of nothing that is a socket. */
function delivery(stores: number): string {
  return Buffer.from(DELIVERY.encode({ place: 0, take: 1, replySize: 0, stores })).toString("hex");
}

/** A message that may be one: the body in hexadecimal, key first. */
const MESSAGE = fc.record({
  id: fc.constantFrom(0, 1, 2, 0xffff_ffff),
  command: fc.oneof(fc.constantFrom(...Object.values(Command)), fc.nat(0xffff)),
  flags: fc.oneof(fc.constantFrom(0, HeaderFlag.more, HeaderFlag.reply), fc.nat(0xffff)),
  key: fc.constantFrom("", "a", "b", "c/1", "__proto__", "\u{1f600}"),
  payload: fc.oneof(
    fc.constantFrom("", HELLO, "5b5d", "5b5b2261222c305d5d", "7b"),
    fc.constantFrom(...RECORDS),
    fc
      .tuple(fc.constantFrom(...Object.values(Stores), 3), fc.constantFrom("", ...RECORDS))
      .map(([stores, record]) => `${delivery(stores)}${record}`),
    fc.uint8Array({ maxLength: 64 }).map((bytes) => Buffer.from(bytes).toString("hex")),
    fc.constantFrom("00".repeat(3000), "ff".repeat(65_536)),
  ),
  fds: fc.nat(6),
  /** The header lies by so much. */
  lie: fc.oneof({ weight: 9, arbitrary: fc.constant(0) }, { weight: 1, arbitrary: fc.nat(0x2_0000) }),
});
/** Cut off in the middle of the last message, or all is sent. */
const TALK = fc.record({
  greets: fc.boolean(),
  messages: fc.array(MESSAGE, { maxLength: 12 }),
  cut: fc.option(fc.nat(40)),
});
type Talk = typeof TALK extends fc.Arbitrary<infer T> ? T : never;
interface Message {
  readonly id: number;
  readonly command: number;
  readonly flags: number;
  readonly key: string;
  readonly payload: string;
  readonly lie: number;
}

function encode({ id, command, flags, key, payload, lie }: Message): Buffer {
  const body = Buffer.concat([Buffer.from(key), Buffer.from(payload, "hex")]);
  const keySize = Buffer.from(key).length;
  return Buffer.concat([HEADER.encode({ id, command, flags, keySize, bodySize: body.length + lie }), body]);
}

async function talk(path: string, { greets, messages, cut }: Talk): Promise<void> {
  using fd = eventfd();
  using socket = new MessageSocket(connectUnix(path), { headerSize: 16, maxFds: 253, bodySize: bodySize });
  const read = (async () => {
    for (;;) {
      using answer = await socket.receive();
      if (answer === undefined) return;
    }
  })().catch(() => {});
  const greeting = { id: 1, command: Command.hello, flags: 0, key: "", payload: HELLO, fds: 0, lie: 0 };
  const all = greets ? [greeting, ...messages] : messages;
  try {
    for (const [index, message] of all.entries()) {
      const bytes = encode(message);
      const isCut = index === all.length - 1 && cut !== null;
      await socket.send(isCut ? bytes.subarray(0, Math.max(1, cut)) : bytes, Array(message.fds).fill(fd.number));
    }
    shutDown(socket.fd);
  } catch {
    // It was hung up on.
  }
  await soon().race(read);
}

function bodySize(header: Uint8Array): number {
  return HEADER.read(header).bodySize;
}

test(
  "whatever clients say, the keeper keeps what it has, within its limits",
  async () => {
    const before = liveFds();
    {
      await using lab = await KeeperLab.create(LIMITS);
      using fd = eventfd();
      const look = async () => {
        using client = await lab.connect();
        const stored = await client.get(KEPT);
        for (const each of stored?.fds.values() ?? []) each[Symbol.dispose]();
        return { record: stored?.record, names: [...(stored?.fds.keys() ?? [])] };
      };
      {
        using client = await lab.connect();
        await client.put(KEPT, () => ({ record: "what is kept", fds: new Map([["kick", fd.number]]) }));
      }
      await fuzz(
        "keeper",
        fc.asyncProperty(TALK, (said) => talk(lab.path, said)),
        {
          async between() {
            expect(await look()).toEqual({ record: "what is kept", names: ["kick"] });
            const { records, bytes, fds } = lab.store.totals;
            expect(records).toBeLessThanOrEqual(LIMITS.records);
            expect(bytes).toBeLessThanOrEqual(LIMITS.totalSize);
            expect(fds).toBeLessThanOrEqual(LIMITS.totalFds);
            // Those of records, of this test, and of the keeper's socket.
            await soon().poll(() => (liveFds() === before + fds + 2 && pendingCloses() === 0) || undefined, 1);
          },
        },
      );
    }
    expect(liveFds()).toBe(before);
  },
  FUZZ_TIMEOUT,
);
