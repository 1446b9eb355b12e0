import { expect, test } from "bun:test";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { Deadline } from "../../../src/base/deadline.ts";
import { isReadable, memfd, socketPair } from "../../../src/native/sys.ts";
import { BackendRequest, Request } from "../../../src/vhost-user/messages.ts";
import { BackendRequests, WireChannel } from "../../kit/frontend/channel.ts";
import type { VhostUserFrontend } from "../../kit/frontend/frontend.ts";
import { Child } from "../../kit/guest/child.ts";
import { connect, startRunning } from "./harness.ts";
import { userfaultfd } from "./lock-holder.ts";

/** A front-end that does with the back-end's channel what the protocol does not expect. */

const NOTHING = new Uint8Array();
const FULL = "does not read the back-end's channel";
const DOORBELLS = `${FULL}: doorbells`;

async function give(frontend: VhostUserFrontend, channel: number): Promise<void> {
  await frontend.command(Request.SET_BACKEND_REQ_FD, NOTHING, [channel]);
}

test("what the front-end sends on it is never read", async () => {
  await using pair = connect();
  const { frontend, target } = pair;
  await frontend.negotiate();
  const [ours, theirs] = socketPair();
  using kept = theirs;
  using front = new WireChannel(ours);
  await front.sendRaw(Uint8Array.of(1));
  await give(frontend, kept.number);
  target.changeConfig(Uint8Array.of(9));
  const message = await front.receive();
  expect(message?.request).toBe(BackendRequest.CONFIG_CHANGE_MSG);
  expect(await frontend.getConfig(0, 1)).toEqual(Uint8Array.of(9));
  expect(isReadable(kept.number)).toBe(true);
});

test("where it is full, changes are told as one when there is room, and doorbells are not given", async () => {
  using doorbell = memfd("doorbell", 4096);
  await using pair = connect({ doorbellShare: async () => ({ fd: doorbell.number, offset: 0, size: 4096 }) });
  const { frontend, target } = pair;
  await startRunning(frontend, 2);
  const [ours, theirs] = socketPair();
  {
    using _sent = theirs;
    await give(frontend, theirs.number);
  }
  const warnings = (text = FULL) => pair.lines.filter((line) => line.includes(text)).length;
  let changes = 0;
  for (; warnings() === 0 && changes < 10_000; changes++) target.changeConfig(Uint8Array.of(changes));
  for (let more = 0; more < 100; more++) target.changeConfig(Uint8Array.of(more));
  expect([warnings(), warnings(DOORBELLS)]).toEqual([1, 0]);
  await frontend.resumeQueues(await frontend.stop({ order: "new" }));
  expect(target.running?.queues).toHaveLength(2);
  expect([warnings(), warnings(DOORBELLS)]).toEqual([2, 1]);

  using requests = new BackendRequests(ours);
  await requests.wait(changes);
  await frontend.resumeQueues(await frontend.stop({ order: "new" }));
  await requests.wait(changes + 2);
  const { CONFIG_CHANGE_MSG, VRING_HOST_NOTIFIER_MSG } = BackendRequest;
  const told = [...Array(changes).fill(CONFIG_CHANGE_MSG), VRING_HOST_NOTIFIER_MSG, VRING_HOST_NOTIFIER_MSG];
  expect(requests.received.map(({ request }) => request)).toEqual(told);
});

test("another one in the place of one that is full: the change that waits is told there, once", async () => {
  await using pair = connect();
  const { frontend, target } = pair;
  await startRunning(frontend, 1);
  const [ours, theirs] = socketPair();
  using _unread = ours;
  {
    using _sent = theirs;
    await give(frontend, theirs.number);
  }
  const isFull = () => pair.lines.some((line) => line.includes(FULL));
  for (let changes = 0; !isFull() && changes < 10_000; changes++) target.changeConfig(Uint8Array.of(changes));
  expect(isFull()).toBe(true);
  await frontend.openBackendChannel();
  await frontend.backendRequests!.wait(1);
  expect(frontend.backendRequests!.received[0]?.request).toBe(BackendRequest.CONFIG_CHANGE_MSG);
  // Nothing waits any more.
  const [last, given] = socketPair();
  using _last = last;
  using _given = given;
  await give(frontend, given.number);
  expect(isReadable(last.number)).toBe(false);
});

/** Why the lock cannot be held: nothing but userfaultfd leaves a fault unanswered without a file system of one's own. */
function whyNot(): string | undefined {
  using faults = userfaultfd();
  return faults === undefined ? "this process may not use userfaultfd" : undefined;
}

const reason = whyNot();
test.skipIf(reason !== undefined)(
  `a front-end that reads from the back-end's end, and never ends reading, holds up nobody${reason === undefined ? "" : ` [skip: ${reason}]`}`,
  async () => {
    const directory = mkdtempSync(join(tmpdir(), "back-channel-"));
    try {
      await using pair = connect();
      const { frontend, target } = pair;
      await frontend.negotiate();
      const [ours, theirs] = socketPair();
      using kept = theirs;
      using front = new WireChannel(ours);
      await front.sendRaw(Uint8Array.of(1));
      const program = [process.execPath, join(import.meta.dir, "lock-holder.ts")];
      const log = join(directory, "log");
      await using holder = new Child(program, { name: "lock holder", log, fds: [kept.number] });
      const holds = () => readFileSync(`/proc/${holder.pid}/wchan`, "utf8") === "handle_userfault";
      await Deadline.after(10_000, `the lock: ${holder.log}`).poll(() => holds() || undefined, 5);

      await give(frontend, kept.number);
      target.changeConfig(Uint8Array.of(9));
      expect((await front.receive())?.request).toBe(BackendRequest.CONFIG_CHANGE_MSG);
      expect(await frontend.getConfig(0, 1)).toEqual(Uint8Array.of(9));
      await frontend.openBackendChannel();
      target.changeConfig(Uint8Array.of(8));
      await frontend.backendRequests!.wait(1);
      expect(holds()).toBe(true);
    } finally {
      rmSync(directory, { recursive: true });
    }
  },
  30_000,
);
