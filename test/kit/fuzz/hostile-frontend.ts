import { Deadline } from "../../../src/base/deadline.ts";
import { VhostdError } from "../../../src/base/errors.ts";
import type { OwnedFd } from "../../../src/native/fd.ts";
import { HEADER } from "../../../src/vhost-user/messages.ts";
import { WireChannel } from "../frontend/channel.ts";
import type { FdPool } from "./fd-pool.ts";
import { type FuzzedSession, MARKER } from "./vhost-user.ts";
import { type FuzzedMessage, message } from "./vhost-user-message.ts";

/** Messages sent between two looks at how far the back-end has come. */
const STRETCH = 32;
/** A back-end that has neither answered nor hung up by then hangs. Milliseconds. */
const PATIENCE = 20_000;

const MARK = message(MARKER);

/**
 * Sends a fuzzed session over a connection, and hangs up.
 * @param fd connected; taken over
 * @returns how many messages the back-end has handled for certain: those before an answer of it, and the one that it
 * hung up on
 * @throws VhostdError timedOut where it neither answers nor hangs up
 */
export async function runHostileFrontend(fd: OwnedFd, session: FuzzedSession, pool: FdPool): Promise<number> {
  using channel = new WireChannel(fd);
  const answers = new Answers(channel);
  const { messages, tail } = session;
  let handled = 0;
  let asked = 0;
  try {
    for (let from = 0; from < messages.length; from += STRETCH) {
      const stretch = [...messages.slice(from, from + STRETCH), MARK];
      await send(channel, stretch, pool);
      // Behind a size that is a lie there are no messages any more: the back-end may wait for the rest of one.
      if (stretch.some(({ size, payload }) => size !== payload.byteLength)) return handled;
      asked += stretch.filter(({ request }) => request === MARKER).length;
      if (!(await answers.reach(asked))) return handled + 1;
      handled += stretch.length;
    }
    if (tail.byteLength > 0) await channel.sendRaw(tail);
  } catch (error) {
    if (!(error instanceof VhostdError) || error.code === "timedOut") throw error;
    return handled + 1;
  }
  return handled;
}

/** Messages without descriptors go out together. */
async function send(channel: WireChannel, messages: readonly FuzzedMessage[], pool: FdPool): Promise<void> {
  let waiting: Uint8Array[] = [];
  const flush = async () => {
    const bytes = Buffer.concat(waiting);
    waiting = [];
    if (bytes.length > 0) await channel.sendRaw(bytes);
  };
  for (const { request, flags, size, payload, fds } of messages) {
    const bytes = Buffer.concat([HEADER.encode({ request, flags, size }), payload]);
    if (fds.length === 0) {
      waiting.push(bytes);
      continue;
    }
    await flush();
    await channel.sendRaw(
      bytes,
      fds.map((kind) => pool.number(kind)),
    );
  }
  await flush();
}

/** Takes what the back-end says, so that it never waits for us, and counts its answers to the marker. */
class Answers {
  private seen = 0;
  private ended = false;
  private wanted = 0;
  private wake: () => void = () => {};

  constructor(private readonly channel: WireChannel) {
    void this.receive();
  }

  /** @returns false where the back-end has hung up before. @throws VhostdError timedOut */
  async reach(count: number): Promise<boolean> {
    this.wanted = count;
    if (this.seen < count && !this.ended) {
      const { promise, resolve } = Promise.withResolvers<void>();
      this.wake = resolve;
      await Deadline.after(PATIENCE, "an answer or the hang-up of the back-end").race(promise);
    }
    return this.seen >= count;
  }

  private async receive(): Promise<void> {
    try {
      for (;;) {
        const answer = await this.channel.receive();
        if (answer === undefined) break;
        for (const fd of answer.fds) fd[Symbol.dispose]();
        if (answer.request === MARKER && ++this.seen >= this.wanted) this.wake();
      }
    } catch {
      // Hung up in the middle of a message, or closed by us: there is nothing more to count.
    }
    this.ended = true;
    this.wake();
  }
}
