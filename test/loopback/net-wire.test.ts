import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { Deadline } from "../../src/base/deadline.ts";
import { liveFds } from "../../src/native/fd.ts";
import { FeatureBit, featureBits } from "../../src/virtio/features.ts";
import { MOVERS } from "../kit/movers.ts";
import { NetFeature, type NetFrontendOptions } from "../kit/net/net-frontend.ts";
import { NetLab } from "../kit/net/net-lab.ts";
import { COMPLETE, type FrameStream } from "../kit/net/streams.ts";

/** Two guests, back to back: each frame is numbered and verified, each receive buffer is watched. */

const PAIRS = 4;
const PATIENCE = 10_000;
/** Milliseconds in which a pair in use sends a good many frames. */
const QUIET = 20;

const progress = (streams: readonly FrameStream[], frames: number) =>
  Promise.all(streams.map((stream) => stream.progress(frames)));
const stop = (streams: readonly FrameStream[]) => Promise.all(streams.map((stream) => stream.stop()));

describe.each(MOVERS)("moved by $mover", ({ mover, migration }) => {
  let lab: NetLab;
  beforeAll(async () => {
    lab = await NetLab.create({ migration, pairs: PAIRS });
  }, 30_000);
  afterAll(async () => {
    await lab?.[Symbol.asyncDispose]();
  });

  for (const pairs of [1, PAIRS]) {
    for (const mergeable of [true, false]) {
      test(`pairs: ${pairs}, mergeable: ${mergeable}: every frame arrives once, in order, by its own pair`, async () => {
        await lab.idle(0, 1);
        const idle = liveFds();
        const before = await lab.stats(0);
        {
          using here = await lab.boot(0, { pairs, mergeable });
          using there = await lab.boot(1, { pairs, mergeable });
          const streams = [...here.streams(there), ...there.streams(here)];
          await progress(streams, 200);
          expect(await stop(streams)).toEqual(streams.map(() => COMPLETE));
          expect(streams.map(({ arrived }) => [...arrived.pairs])).toEqual(streams.map((_, at) => [at % pairs]));
          for (const guest of [here, there]) {
            await guest.checkBuffers();
            expect(guest.sink.strange).toBe(0);
          }
          const after = await lab.stats(0);
          for (const [pair, { sent, received }] of here.pairs.entries()) {
            const taken = (queue: number) => after[queue]!.received - before[queue]!.received;
            expect(taken(2 * pair + 1)).toBe(sent);
            expect(taken(2 * pair)).toBeGreaterThanOrEqual(received);
          }
          expect(after.map(({ bad }) => bad)).toEqual(before.map(({ bad }) => bad));
          expect(after.map(({ received }) => received)).toEqual(after.map(({ completed }) => completed));
        }
        await lab.idle(0, 1);
        expect(liveFds()).toBe(idle);
      }, 30_000);
    }
  }

  test("a guest is stopped and goes on under traffic, in both orders of messages", async () => {
    await lab.idle(0, 1);
    using here = await lab.boot(0, { pairs: 2 });
    using there = await lab.boot(1, { pairs: 2 });
    const [sending, receiving] = [here.streams(there), there.streams(here)];
    for (const order of ["old", "new", "old"] as const) {
      await progress([...sending, ...receiving], 20);
      // Without its PF a function can only serve until nothing is left.
      if (mover === "registers") for (const stream of sending) stream.pause();
      const bases = await here.frontend.stop({ order });
      const stopped = here.usedIndices;
      const transmitQueues = (indices: readonly number[]) => indices.filter((_, queue) => queue % 2 === 1);
      expect(transmitQueues(bases)).toEqual(transmitQueues(stopped));
      await Bun.sleep(10);
      expect(transmitQueues(here.usedIndices)).toEqual(transmitQueues(bases));
      // It goes on to receive where nobody can freeze it.
      if (mover === "vendor") expect(here.usedIndices).toEqual(bases);
      await here.frontend.resumeQueues(bases);
      for (const stream of sending) stream.resume();
    }
    await progress([...sending, ...receiving], 100);
    expect((await stop(sending)).map(({ reordered }) => reordered)).toEqual([0, 0]);
    expect((await stop(receiving)).map(({ reordered }) => reordered)).toEqual([0, 0]);
    await here.checkBuffers();
    await there.checkBuffers();
  }, 30_000);

  test("one pair of four is set up: it has all the traffic", async () => {
    await lab.idle(0, 1);
    using here = await lab.boot(0, { pairs: 1 });
    using there = await lab.boot(1, { pairs: PAIRS });
    const streams = [...here.streams(there), ...there.streams(here)];
    await progress(streams, 50);
    for (const { lost } of await stop(streams)) expect(lost).toBe(0);
    await here.checkBuffers();
    await there.checkBuffers();
  }, 30_000);

  test("pairs are enabled and disabled while traffic flows: a disabled one gets and sends nothing", async () => {
    await lab.idle(0, 1);
    using here = await lab.boot(0, { pairs: PAIRS, enabled: 1 });
    using there = await lab.boot(1, { pairs: PAIRS });
    const sending = here.pairs.map((_, pair) => here.stream(pair, there));
    const receiving = there.streams(here);
    for (const enabled of [1, PAIRS, 2, PAIRS, 1, 3]) {
      await here.frontend.useOnly(enabled);
      const inUse = [...sending.slice(0, enabled), ...receiving.slice(0, enabled)];
      // The device may learn of it a moment later, in which all pairs may get on.
      await Deadline.after(PATIENCE, `rest of the pairs from ${enabled} on`).poll(async () => {
        const before = here.usedIndices;
        await progress(inUse, 20);
        await Bun.sleep(QUIET);
        return Bun.deepEquals(before.slice(2 * enabled), here.usedIndices.slice(2 * enabled)) || undefined;
      }, 1);
    }
    await here.frontend.useOnly(PAIRS);
    // Also what had been made available before.
    await progress(sending, 20);
    expect((await stop(sending)).map(({ lost }) => lost)).toEqual(sending.map(() => 0));
    await stop(receiving);
    await here.checkBuffers();
    await there.checkBuffers();
  }, 30_000);

  test("the daemon is restarted under traffic: what it has to do afterwards works as before", async () => {
    await lab.idle(0, 1);
    using here = await lab.boot(0, { pairs: PAIRS, enabled: 1 });
    using there = await lab.boot(1, { pairs: PAIRS });
    const sending = here.pairs.map((_, pair) => here.stream(pair, there));
    await sending[0]!.progress(20);
    await lab.restartDaemon();
    await sending[0]!.progress(20);
    await here.frontend.useOnly(PAIRS);
    await progress(sending, 20);
    if (mover === "registers") for (const stream of sending) stream.pause();
    await here.frontend.resumeQueues(await here.frontend.stop({ order: "old" }));
    for (const stream of sending) stream.resume();
    await progress(sending, 20);
    expect((await stop(sending)).map(({ lost }) => lost)).toEqual(sending.map(() => 0));
    await here.checkBuffers();
    await there.checkBuffers();
  }, 30_000);

  test("one front-end after another, each with other features", async () => {
    await lab.idle(0, 1);
    using there = await lab.boot(1, { pairs: PAIRS });
    const without = (...bits: number[]) => ~featureBits(...bits);
    const { ringEventIdx, ringIndirectDesc } = FeatureBit;
    const CHOICES: readonly NetFrontendOptions[] = [
      { pairs: 1, mergeable: false, features: without(ringEventIdx, ringIndirectDesc, NetFeature.mq) },
      { pairs: PAIRS, mergeable: true, features: without(ringEventIdx) },
      { pairs: 2, mergeable: false, features: without(ringIndirectDesc) },
      { pairs: 3, mergeable: true, features: without(NetFeature.status, NetFeature.mtu, NetFeature.mac) },
      { pairs: 1, mergeable: true },
    ];
    for (const choice of CHOICES) {
      {
        using here = await lab.boot(0, choice);
        const streams = [...here.streams(there), ...there.streams(here)];
        await progress(streams, 20);
        for (const { lost } of await stop(streams.slice(0, here.pairs.length))) expect(lost).toBe(0);
        await stop(streams.slice(here.pairs.length));
        await here.checkBuffers();
      }
      await lab.idle(0);
      expect(lab.info(0).reason).toBeNull();
    }
    await there.checkBuffers();
  }, 30_000);
});
