import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { liveFds } from "../../src/native/fd.ts";
import { NetLab } from "../kit/net/net-lab.ts";
import type { FrameStream } from "../kit/net/streams.ts";

/**
 * A guest whose back-end is lost and comes back, at any index of its rings and under load. The network may lose frames
 * meanwhile. None comes twice or different, and each buffer is given back once, in its turn.
 */

const PAIRS = 2;

const progress = (streams: readonly FrameStream[], frames: number) =>
  Promise.all(streams.map((stream) => stream.progress(frames)));
const noneLate = async (streams: readonly FrameStream[]) => {
  for (const stream of streams) expect((await stream.stop()).reordered).toBe(0);
};

describe("a managed VF", () => {
  let lab: NetLab;
  beforeAll(async () => {
    lab = await NetLab.create({ pairs: PAIRS });
  }, 30_000);
  afterAll(async () => {
    await lab?.[Symbol.asyncDispose]();
  });

  for (const freeze of ["drain", "list", "hold"] as const) {
    for (const mergeable of [true, false]) {
      test(`--freeze ${freeze}, mergeable: ${mergeable}: lost and found under load`, async () => {
        await lab.idle(0, 1);
        const idle = liveFds();
        await lab.daemon.set(lab.daemon.pf, { freeze });
        {
          const options = { pairs: PAIRS, mergeable };
          // The indices pass 65535 while all this happens.
          using here = await lab.boot(0, { ...options, firstIndex: 0x10000 - 200 });
          using there = await lab.boot(1, options);
          const streams = [...here.streams(there), ...there.streams(here)];
          for (let times = 0; times < 3; times++) {
            await progress(streams, 20);
            await here.reconnect(
              () => lab.dial(0, options),
              () => lab.idle(0),
            );
          }
          const bases = await here.frontend.stop({ order: "old" });
          await here.reconnect(
            () => lab.dial(0, options),
            () => lab.idle(0),
          );
          expect(bases).toHaveLength(2 * PAIRS);
          // More than there are buffers: each of them has its turn.
          await progress(streams, 200);
          await noneLate(streams);
          for (const guest of [here, there]) await guest.checkBuffers();
          for (const { driver } of here.frontend.queues) expect(driver.returned).toBeGreaterThan(200);
        }
        await lab.idle(0, 1);
        expect(liveFds()).toBe(idle);
      }, 30_000);
    }
  }

  test("a pair that is being enabled when the daemon dies is enabled by the next one", async () => {
    await lab.idle(0, 1);
    using here = await lab.boot(0, { pairs: PAIRS, enabled: 1 });
    using there = await lab.boot(1, { pairs: PAIRS });
    await lab.daemon.set(lab.daemon.pf, { "admin-delay": "modify=100" });
    here.frontend.replies = "as QEMU";
    await here.frontend.enablePair(1, true);
    // Between two steps, with the function stopped.
    await Bun.sleep(150);
    await lab.restartDaemon();
    await lab.daemon.set(lab.daemon.pf, { "admin-delay": "" });
    here.frontend.enabled = PAIRS;
    const streams = [...here.streams(there), ...there.streams(here)];
    await progress(streams, 20);
    await noneLate(streams);
  }, 30_000);

  test("any index is one to begin at, to stop at, and to come back to", async () => {
    await lab.idle(0, 1);
    await lab.daemon.set(lab.daemon.pf, { freeze: "drain" });
    using there = await lab.boot(1);
    for (const firstIndex of [0, 1, 255, 256, 0x7fff, 0x8000, 0xfff0, 0xffff]) {
      using here = await lab.boot(0, { firstIndex });
      // Stopped before anything was there, too.
      expect(await here.frontend.stop({ order: "new" })).toEqual([firstIndex, firstIndex]);
      await here.frontend.resumeQueues([firstIndex, firstIndex]);
      const streams = [...here.streams(there), ...there.streams(here)];
      await progress(streams, 10);
      const bases = await here.frontend.stop({ order: "new" });
      expect(bases).toEqual(here.usedIndices);
      await here.frontend.resumeQueues(bases);
      await progress(streams, 10);
      await here.reconnect(
        () => lab.dial(0),
        () => lab.idle(0),
      );
      await progress(streams, 10);
      await noneLate(streams);
      await here.checkBuffers();
    }
    await there.checkBuffers();
  }, 30_000);
});
