import { afterEach, beforeEach, describe, expect, test } from "bun:test";
import * as fc from "fast-check";
import { VhostdError } from "../../../src/base/errors.ts";
import { type OwnedFd, pendingCloses } from "../../../src/native/fd.ts";
import { c } from "../../../src/native/load.ts";
import {
  type Framing,
  type Message,
  MessageSocket,
  type MessageSocketOptions,
  type PeekedMessage,
} from "../../../src/native/message-socket.ts";
import { watch } from "../../../src/native/poller.ts";
import { eventfd, fileInfo, memfd, signalEventfd, socketPair } from "../../../src/native/sys.ts";
import { rejection } from "../../kit/rejection.ts";
import { LingeringSocket } from "./lingering-socket.ts";
import { eventually, openFds, warmUp } from "./open-fds.ts";

/** Four bytes: 0x7e, and the size of the body in three. */
const framing: Framing = {
  headerSize: 4,
  bodySize(header) {
    if (header[0] !== 0x7e) throw new VhostdError("protocol", `message begins with ${header[0]}`);
    return header[1]! | (header[2]! << 8) | (header[3]! << 16);
  },
  maxFds: 8,
};

function message(body: Uint8Array): Uint8Array {
  const bytes = new Uint8Array(4 + body.length);
  bytes.set([0x7e, body.length & 0xff, (body.length >> 8) & 0xff, body.length >> 16]);
  bytes.set(body, 4);
  return bytes;
}

/** What a peer does that has no MessageSocket. */
function sendRaw(fd: OwnedFd, bytes: Uint8Array, fds: number[] = []): void {
  const numbers = Int32Array.from([...fds, 0]);
  expect(Number(c.vhostd_send(fd.number, bytes, bytes.length, numbers, fds.length))).toBe(bytes.length);
}

/** The bytes that wait in a socket, as far as one look shows them. */
function waiting(fd: number): number {
  return Number(c.vhostd_peek(fd, new Uint8Array(4096), 4096));
}

/** The code of the error that `promise` rejects with. */
async function codeOf(promise: Promise<unknown>): Promise<string> {
  try {
    await promise;
  } catch (error) {
    if (error instanceof VhostdError) return error.code;
    throw error;
  }
  return "none";
}

let peer: OwnedFd;
let socket: MessageSocket;
let fdsBefore: number;

/** Times in milliseconds; the defaults are long, so that what times out in a test was asked to. */
function connect(options: MessageSocketOptions = {}, more: Partial<Framing> = {}) {
  const [left, right] = socketPair();
  peer[Symbol.dispose]();
  socket[Symbol.dispose]();
  peer = left;
  socket = new MessageSocket(right, { ...framing, ...more }, options);
}

beforeEach(() => {
  warmUp();
  fdsBefore = openFds();
  const [left, right] = socketPair();
  peer = left;
  socket = new MessageSocket(right, framing);
});

afterEach(() => {
  peer[Symbol.dispose]();
  socket[Symbol.dispose]();
  expect(openFds()).toBe(fdsBefore);
});

test("a message arrives with its fds, in order", async () => {
  const files = [memfd("a", 10), memfd("b", 20), eventfd()];
  const numbers = files.map((file) => file.number);
  const received = socket.receive();
  sendRaw(peer, message(Uint8Array.of(1, 2, 3)), numbers);
  using arrived = (await received) as Message;
  expect([...arrived.header]).toEqual([0x7e, 3, 0, 0]);
  expect([...arrived.body]).toEqual([1, 2, 3]);
  expect(arrived.fds.map((fd) => fileInfo(fd.number))).toEqual(numbers.map(fileInfo));
  const [kept] = arrived.fds.splice(0, 1);
  arrived[Symbol.dispose]();
  expect(kept?.closed).toBe(false);
  kept?.[Symbol.dispose]();
  for (const file of files) file[Symbol.dispose]();
});

test("nothing is taken before it is asked for, nor more than one message", async () => {
  using file = memfd("a", 10);
  sendRaw(peer, message(Uint8Array.of(1)), [file.number]);
  sendRaw(peer, message(Uint8Array.of()), [file.number, file.number]);
  const count = openFds();
  await Bun.sleep(5);
  expect(openFds()).toBe(count);
  using first = (await socket.receive()) as Message;
  expect([...first.body]).toEqual([1]);
  expect(first.fds.length).toBe(1);
  expect(waiting(socket.fd)).toBe(4);
  using second = (await socket.receive()) as Message;
  expect(second.fds.length).toBe(2);
});

describe("a message that is looked at", () => {
  test("lies in the socket with its fds until it is finished, for others too", async () => {
    using file = memfd("a", 10);
    sendRaw(peer, message(Uint8Array.of(1, 2)), [file.number]);
    sendRaw(peer, message(Uint8Array.of(3)));
    for (const _look of [0, 1, 2]) {
      using seen = (await socket.peek()) as PeekedMessage;
      expect(seen.left).toBe(true);
      expect([...seen.header, ...seen.body]).toEqual([0x7e, 2, 0, 0, 1, 2]);
      expect(seen.fds.map(({ number }) => fileInfo(number))).toEqual([fileInfo(file.number)]);
    }
    expect(socket.startsWith(message(Uint8Array.of(1, 2)))).toBe(true);
    expect(socket.startsWith(message(Uint8Array.of(1, 3)))).toBe(false);
    using first = (await socket.peek()) as PeekedMessage;
    const [kept] = first.fds.splice(0);
    first.finish();
    expect(fileInfo(kept!.number)).toEqual(fileInfo(file.number));
    kept![Symbol.dispose]();
    using second = (await socket.peek()) as PeekedMessage;
    expect([[...second.body], second.fds.length]).toEqual([[3], 0]);
    second.finish();
    expect(waiting(socket.fd)).toBe(-11);
  });

  test("has the fds that came with it, and none of those behind it", async () => {
    connect({}, { mayCarryFds: (header) => header[1] === 1 });
    using file = memfd("a", 10);
    // Two messages without any; one of them may have some, and is taken out for that.
    for (const body of [[1, 2], [1]]) sendRaw(peer, message(Uint8Array.from(body)));
    sendRaw(peer, message(Uint8Array.of(5)), [file.number]);
    sendRaw(peer, message(Uint8Array.of(6)), [file.number, file.number]);
    const seen: unknown[] = [];
    for (const _message of [0, 1, 2, 3]) {
      using next = (await socket.peek()) as PeekedMessage;
      seen.push([[...next.body], next.fds.length, next.left]);
      next.finish();
    }
    expect(seen).toEqual([
      [[1, 2], 0, true],
      [[1], 0, false],
      [[5], 1, true],
      [[6], 2, true],
    ]);
  });

  test("and lies there with another in one piece has the fds of both", async () => {
    using file = memfd("a", 10);
    const both = [...message(Uint8Array.of(1)), ...message(Uint8Array.of(2))];
    sendRaw(peer, Uint8Array.from(both), [file.number]);
    using first = (await socket.peek()) as PeekedMessage;
    expect([[...first.body], first.fds.length]).toEqual([[1], 1]);
    first.finish();
    using second = (await socket.peek()) as PeekedMessage;
    expect([[...second.body], second.fds.length]).toEqual([[2], 0]);
  });

  test("is taken out where it comes in pieces, which is said before", async () => {
    const bytes = message(Uint8Array.of(1, 2, 3));
    using file = memfd("a", 10);
    for (const cut of [1, 4, 5]) {
      let told = 0;
      connect({ beforeTaking: () => told++ });
      sendRaw(peer, bytes.subarray(0, cut), [file.number]);
      const seen = socket.peek();
      await Bun.sleep(3);
      sendRaw(peer, bytes.subarray(cut), [file.number]);
      using arrived = (await seen) as PeekedMessage;
      expect(told).toBe(1);
      expect([[...arrived.body], arrived.fds.length, arrived.left]).toEqual([[1, 2, 3], 2, false]);
      arrived.finish();
      expect(waiting(socket.fd)).toBe(-11);
    }
  });

  test("with too many fds is refused", async () => {
    using file = memfd("a", 10);
    sendRaw(peer, message(Uint8Array.of(1)), new Array<number>(9).fill(file.number));
    expect((await rejection(socket.peek())).message).toContain("message carries 9 fds, the limit is 8");
  });

  test("is not touched where the socket was given away meanwhile", async () => {
    sendRaw(peer, message(Uint8Array.of(9)));
    using seen = (await socket.peek()) as PeekedMessage;
    using heir = new MessageSocket(socket.abandon(), framing);
    seen.finish();
    using arrived = await heir.receive();
    expect(arrived?.body[0]).toBe(9);
  });

  test("holds up nobody with an fd whose close does not return", async () => {
    using hostile = new LingeringSocket();
    sendRaw(peer, message(Uint8Array.of(1)), [hostile.fd.number]);
    hostile.fd[Symbol.dispose]();
    const seen = (await socket.peek()) as PeekedMessage;
    seen[Symbol.dispose]();
    // The last one that holds it is the socket now.
    seen.finish();
    expect(await eventually(() => pendingCloses() === 1)).toBe(true);
    hostile.release();
  });
});

test("messages arrive whole, wherever the stream was cut", async () => {
  const bodies = fc.array(fc.uint8Array({ maxLength: 40 }), { minLength: 1, maxLength: 6 });
  await fc.assert(
    fc.asyncProperty(bodies, fc.array(fc.nat(250), { maxLength: 5 }), async (expected, places) => {
      const stream = Uint8Array.from(expected.flatMap((body) => [...message(body)]));
      const cuts = [...new Set([0, ...places.map((place) => place % stream.length), stream.length])];
      cuts.sort((a, b) => a - b);
      const got: number[][] = [];
      const receiving = (async () => {
        while (got.length < expected.length) {
          using arrived = (await socket.receive()) as Message;
          got.push([...arrived.body]);
        }
      })();
      for (let index = 1; index < cuts.length; index++) {
        sendRaw(peer, stream.subarray(cuts[index - 1], cuts[index]));
        await Bun.sleep(0);
      }
      await receiving;
      expect(got).toEqual(expected.map((body) => [...body]));
    }),
    { numRuns: 40 },
  );
});

test("a hang-up between messages ends the stream, one inside a message is an error", async () => {
  const received = socket.receive();
  peer[Symbol.dispose]();
  expect(await received).toBeUndefined();
  for (const cut of [2, 4, 6]) {
    connect();
    using file = memfd("a", 10);
    sendRaw(peer, message(Uint8Array.of(1, 2, 3)).subarray(0, cut), cut >= 4 ? [file.number] : []);
    const torn = socket.receive();
    await Bun.sleep(1);
    peer[Symbol.dispose]();
    expect(await codeOf(torn)).toBe("connectionLost");
  }
});

test("a peer that dies with answers unread has hung up, too", async () => {
  await socket.send(message(Uint8Array.of(1)));
  peer[Symbol.dispose]();
  expect(await socket.receive()).toBeUndefined();
});

test("a message that is begun and not completed times out, its fds are closed", async () => {
  for (const cut of [1, 4, 5]) {
    connect({ partialTimeout: 20 });
    using file = memfd("a", 10);
    sendRaw(peer, message(Uint8Array.of(1, 2, 3)).subarray(0, cut), cut >= 4 ? [file.number] : []);
    expect(await codeOf(socket.receive())).toBe("timedOut");
  }
});

test("too many fds in a message are refused and closed, also when they come in parts", async () => {
  using file = memfd("a", 10);
  sendRaw(peer, message(Uint8Array.of(1)), new Array<number>(9).fill(file.number));
  expect((await rejection(socket.receive())).message).toContain("message carries 9 fds, the limit is 8");
  connect();
  const bytes = message(Uint8Array.of(1));
  sendRaw(peer, bytes.subarray(0, 4), new Array<number>(8).fill(file.number));
  sendRaw(peer, bytes.subarray(4), [file.number]);
  expect((await rejection(socket.receive())).message).toContain("message carries 9 fds, the limit is 8");
});

test("framing decides what is nonsense, and the message stays in the socket", async () => {
  sendRaw(peer, Uint8Array.of(1, 2, 3, 4, 5));
  expect((await rejection(socket.receive())).message).toContain("message begins with 1");
  expect(waiting(socket.fd)).toBe(5);
});

test("a second receive is refused, the first goes on", async () => {
  const first = socket.receive();
  expect(await codeOf(socket.receive())).toBe("invalid");
  sendRaw(peer, message(Uint8Array.of(1)));
  using arrived = await first;
  expect(arrived?.body.length).toBe(1);
});

test("a flood of messages lets the event loop have its turns", async () => {
  for (let count = 0; count < 100; count++) sendRaw(peer, message(Uint8Array.of(count)));
  using other = eventfd();
  let fired = false;
  using _watch = watch(other.number, "in", () => {
    fired = true;
  });
  signalEventfd(other.number);
  Bun.sleepSync(5);
  for (let count = 0; count < 100; count++) {
    using arrived = await socket.receive();
    expect(arrived?.body[0]).toBe(count);
  }
  expect(fired).toBe(true);
});

test("big messages are sent whole and in order to a peer that reads slowly", async () => {
  using reader = new MessageSocket(peer.dup(), framing);
  using file = memfd("a", 10);
  const bodies = [1, 2, 3].map((value) => new Uint8Array(1_000_000).fill(value));
  const sent = Promise.all(bodies.map((body) => socket.send(message(body), [file.number])));
  for (const body of bodies) {
    await Bun.sleep(2);
    using arrived = (await reader.receive()) as Message;
    expect(Buffer.compare(arrived.body, body)).toBe(0);
    expect(arrived.fds.length).toBe(1);
  }
  await sent;
});

test("a peer that never reads costs the send timeout, and every later send", async () => {
  connect({ sendTimeout: 20 });
  const big = message(new Uint8Array(2_000_000));
  const first = socket.send(big);
  const second = socket.send(big);
  expect(await codeOf(first)).toBe("timedOut");
  expect(await codeOf(second)).toBe("timedOut");
});

test("sending to a peer that is gone is a lost connection", async () => {
  peer[Symbol.dispose]();
  expect(openFds()).toBe(fdsBefore + 1);
  expect(await codeOf(socket.send(message(Uint8Array.of(1))))).toBe("connectionLost");
});

test("fds that cannot be sent do not harm the stream", async () => {
  const bytes = message(Uint8Array.of(1));
  expect((await rejection(socket.send(bytes, [1_000_000]))).message).toContain("EBADF");
  expect((await rejection(socket.send(bytes, new Array<number>(254).fill(0)))).message).toContain("254 fds");
  expect((await rejection(socket.send(bytes, [-1]))).message).toContain("file descriptor is -1");
  await socket.send(bytes);
  expect(waiting(peer.number)).toBe(5);
});

test("closing ends what waits", async () => {
  const received = codeOf(socket.receive());
  const sent = codeOf(socket.send(message(new Uint8Array(2_000_000))));
  await Bun.sleep(5);
  socket[Symbol.dispose]();
  socket[Symbol.dispose]();
  expect(await received).toBe("cancelled");
  expect(await sent).toBe("cancelled");
  expect(await codeOf(socket.receive())).toBe("cancelled");
  expect(() => socket.fd).toThrow("closed");
});

test("an abandoned socket is open, silent and has lost nothing", async () => {
  const received = codeOf(socket.receive());
  const fd = socket.abandon();
  expect(await received).toBe("cancelled");
  sendRaw(peer, message(Uint8Array.of(9)));
  socket[Symbol.dispose]();
  using heir = new MessageSocket(fd, framing);
  using arrived = await heir.receive();
  expect(arrived?.body[0]).toBe(9);
});

test("a watch of the same fd by someone else does not disturb", async () => {
  using _other = watch(socket.fd, "in", () => {});
  sendRaw(peer, message(Uint8Array.of(1)));
  using arrived = await socket.receive();
  expect(arrived?.body[0]).toBe(1);
});

test("a header that is cut by fds is one header", async () => {
  using file = memfd("a", 10);
  const bytes = message(Uint8Array.of(1, 2));
  sendRaw(peer, bytes.subarray(0, 1), [file.number]);
  sendRaw(peer, bytes.subarray(1, 3));
  sendRaw(peer, bytes.subarray(3), [file.number, file.number]);
  using arrived = (await socket.receive()) as Message;
  expect([...arrived.header, ...arrived.body]).toEqual([...bytes]);
  expect(arrived.fds.length).toBe(3);
});

test("a peer that hangs up inside a header that is cut by fds is an error", async () => {
  using file = memfd("a", 10);
  sendRaw(peer, message(Uint8Array.of()).subarray(0, 1), [file.number]);
  sendRaw(peer, message(Uint8Array.of()).subarray(1, 2), [file.number]);
  const received = socket.receive();
  await Bun.sleep(1);
  peer[Symbol.dispose]();
  expect(await codeOf(received)).toBe("connectionLost");
});

describe("a peer's fd whose close does not return", () => {
  test("holds up nobody when its message is dropped, and the peer learns of the end", async () => {
    using hostile = new LingeringSocket();
    sendRaw(peer, message(Uint8Array.of(1)), [hostile.fd.number]);
    hostile.fd[Symbol.dispose]();
    const arrived = (await socket.receive()) as Message;
    arrived[Symbol.dispose]();
    socket[Symbol.dispose]();
    expect(pendingCloses()).toBe(2);
    using other = new MessageSocket(peer.dup(), framing);
    expect(await other.receive()).toBeUndefined();
    expect(pendingCloses()).toBe(2);
    hostile.release();
    expect(openFds()).toBe(fdsBefore + 2);
  });

  test("holds up nobody when it lies unread in the socket that is closed", async () => {
    using hostile = new LingeringSocket();
    sendRaw(peer, message(Uint8Array.of(1)), [hostile.fd.number]);
    hostile.fd[Symbol.dispose]();
    socket[Symbol.dispose]();
    for (const other of socketPair()) other[Symbol.dispose]();
    expect(await eventually(() => pendingCloses() === 1)).toBe(true);
    hostile.release();
    expect(openFds()).toBe(fdsBefore + 1);
  });

  test("ends what is taken from that peer, at some point", async () => {
    using hostile = new LingeringSocket();
    connect({ partialTimeout: 20 });
    using file = memfd("a", 10);
    sendRaw(peer, message(Uint8Array.of()), [hostile.fd.number]);
    hostile.fd[Symbol.dispose]();
    let taken = 0;
    const taking = (async () => {
      for (; ; taken++) {
        sendRaw(peer, message(Uint8Array.of()), new Array<number>(8).fill(file.number));
        (await socket.receive())?.[Symbol.dispose]();
      }
    })();
    expect(await codeOf(taking)).toBe("timedOut");
    expect(taken).toBe(129);
    hostile.release();
    await eventually(() => pendingCloses() === 0);
    (await socket.receive())?.[Symbol.dispose]();
  });
});
