import { expect, test } from "bun:test";
import fc from "fast-check";
import { Deadline } from "../../src/base/deadline.ts";
import { VhostdError } from "../../src/base/errors.ts";
import { silentLogger } from "../../src/base/log.ts";
import { liveFds, type OwnedFd } from "../../src/native/fd.ts";
import { eventfd, memfd, socketPair } from "../../src/native/sys.ts";
import { FLAG_NEED_REPLY, Request } from "../../src/vhost-user/messages.ts";
import { Session } from "../../src/vhost-user/session.ts";
import type { WireChannel } from "../kit/frontend/channel.ts";
import { VhostUserFrontend } from "../kit/frontend/frontend.ts";
import { FUZZ_TIMEOUT, fuzz } from "../kit/fuzz.ts";
import { MockTarget } from "../kit/mock-target.ts";

const MEMORY = 1 << 20;
/** Of the same values are made addresses, sizes, indices and flags, so that some of them fit together. */
const NUMBERS = [0, 1, 2, 3, 4, 8, 64, 127, 128, 256, 0x100, 0x101, 0xfff, 0x1000, 0x2000, MEMORY, MEMORY - 1, 2 ** 30];
const LARGE = [2 ** 32, 2 ** 47, 2 ** 53]
  .map(BigInt)
  .concat([(1n << 63n) - 1n, 1n << 63n, (1n << 64n) - 4096n, (1n << 64n) - 1n]);

const word = fc.oneof(
  { weight: 6, arbitrary: fc.constantFrom(...NUMBERS.map(BigInt)) },
  { weight: 2, arbitrary: fc.constantFrom(...LARGE) },
  {
    weight: 2,
    arbitrary: fc
      .tuple(fc.constantFrom(...NUMBERS), fc.nat(4))
      .map(([high, low]) => (BigInt(high) << 32n) | BigInt(low)),
  },
);
const payload = fc.oneof(
  {
    weight: 8,
    arbitrary: fc.array(word, { maxLength: 6 }).map((words) => new Uint8Array(BigUint64Array.from(words).buffer)),
  },
  { weight: 1, arbitrary: fc.uint8Array({ maxLength: 400 }) },
);
const fdKinds = fc.array(fc.constantFrom("memory", "eventfd", "socket"), { maxLength: 2 });
const message = fc.record({
  request: fc.oneof(
    { weight: 15, arbitrary: fc.constantFrom(...Object.values(Request)) },
    { weight: 1, arbitrary: fc.nat(60) },
  ),
  payload,
  fds: fdKinds,
  needReply: fc.boolean(),
});
const beginning = fc.constantFrom("connected", "negotiated", "memory", "running");
type Message = typeof message extends fc.Arbitrary<infer T> ? T : never;
type Beginning = typeof beginning extends fc.Arbitrary<infer T> ? T : never;

function makeFd(kind: "memory" | "eventfd" | "socket", garbage: OwnedFd[]): OwnedFd {
  if (kind === "memory") return memfd("fuzz", MEMORY);
  if (kind === "eventfd") return eventfd();
  const [one, other] = socketPair();
  garbage.push(other);
  return one;
}

async function begin(frontend: VhostUserFrontend, as: Beginning): Promise<void> {
  if (as === "connected") return;
  await frontend.negotiate();
  if (as === "negotiated") return;
  await frontend.setupMemory([{ gpa: 0, size: MEMORY }]);
  if (as === "running") await frontend.startQueues(2, { size: 64, bufferSpace: 64 << 10 });
}

async function sendAll(channel: WireChannel, messages: readonly Message[]): Promise<void> {
  for (const { request, payload, fds, needReply } of messages) {
    const garbage: OwnedFd[] = [];
    const sent = fds.map((kind) => makeFd(kind, garbage));
    try {
      await channel.send(
        request,
        payload,
        sent.map((fd) => fd.number),
        needReply ? FLAG_NEED_REPLY : 0,
      );
    } finally {
      for (const fd of [...sent, ...garbage]) fd[Symbol.dispose]();
    }
  }
}

/** Takes what the session answers, so that it never waits for us. */
async function drain(channel: WireChannel): Promise<void> {
  for (let answer = await channel.receive(); answer !== undefined; answer = await channel.receive()) {
    for (const fd of answer.fds) fd[Symbol.dispose]();
  }
}

/** That the session hangs up on a bad message is its right. */
function hungUp(error: unknown): void {
  if (!(error instanceof VhostdError)) throw error;
}

/** A whole session with a mock VF; fails where it does not end, or leaves anything behind. */
async function session(as: Beginning, talk: (frontend: VhostUserFrontend) => Promise<void>): Promise<void> {
  const before = liveFds();
  const [ours, theirs] = socketPair();
  const target = new MockTarget();
  const ended = new Session(ours, target, { log: silentLogger }).run();
  const frontend = new VhostUserFrontend(theirs);
  let draining = Promise.resolve();
  try {
    await begin(frontend, as);
    draining = drain(frontend.channel).catch(hungUp);
    await talk(frontend).catch(hungUp);
  } finally {
    frontend[Symbol.dispose]();
  }
  await draining;
  const end = await Deadline.after(10_000, "end of the session").race(ended);
  expect(end.reason).not.toBe("");
  expect(target.mapped).toEqual([]);
  expect(target.running).toBeUndefined();
  expect(liveFds()).toBe(before);
}

test(
  "whatever a front-end sends, the session ends cleanly",
  async () => {
    const property = fc.asyncProperty(beginning, fc.array(message, { minLength: 1, maxLength: 12 }), (as, messages) =>
      session(as, (frontend) => sendAll(frontend.channel, messages)),
    );
    await fuzz(property);
  },
  FUZZ_TIMEOUT,
);

test(
  "bytes that are no messages end the session cleanly",
  async () => {
    const property = fc.asyncProperty(beginning, fc.uint8Array({ maxLength: 600 }), (as, bytes) =>
      session(as, (frontend) => frontend.channel.sendRaw(bytes)),
    );
    await fuzz(property);
  },
  FUZZ_TIMEOUT,
);
