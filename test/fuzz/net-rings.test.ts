import { expect, test } from "bun:test";
import fc from "fast-check";
import { Deadline } from "../../src/base/deadline.ts";
import { liveFds } from "../../src/native/fd.ts";
import { holdings } from "../kit/fuzz/holdings.ts";
import { FUZZ_TIMEOUT, fuzz, SEED } from "../kit/fuzz.ts";
import { MOVERS } from "../kit/movers.ts";
import { HOSTILE_RING, hostileSteps, runHostileDriver } from "../kit/net/hostile-driver.ts";
import { NetLab } from "../kit/net/net-lab.ts";
import { COMPLETE } from "../kit/net/streams.ts";

/**
 * A guest's network driver that writes nonsense into its rings, through front-end, daemon and device. The guest at the other
 * end of its wire gets whole frames or none, and the traffic of two others goes on.
 */

const PATIENCE = 10_000;
/** Of the traffic that goes on meanwhile. */
const PACE = { interval: 2 };
/** Frames that the peer of the hostile guest sends to it meanwhile. */
const FRAMES = 4;

test.each(MOVERS)(
  "whatever a driver writes into its rings, no other guest has to do with it, moved by $mover",
  async ({ migration }) => {
    const own = liveFds();
    {
      await using lab = await NetLab.create({
        ...{ migration, pairs: 2, vfs: 4 },
        deadlines: { firstBackoff: 1, longestBackoff: 1, drain: 200, lastDrain: 200 },
      });
      using here = await lab.boot(2, { pairs: 2 });
      using there = await lab.boot(3, { pairs: 2 });
      const traffic = [...here.streams(there, PACE), ...there.streams(here, PACE)];
      using peer = await lab.boot(1, { mergeable: false });
      const { softvf } = lab.daemon;
      const held = () => holdings(softvf.pid, Deadline.after(PATIENCE, "a steady number of files and mappings"));
      const before = await held();
      let runs = 0;
      const property = fc.asyncProperty(fc.boolean(), hostileSteps, async (mergeable, steps) => {
        runs++;
        using frontend = lab.dial(0, { mergeable });
        await frontend.negotiate();
        await frontend.setupMemory([{ gpa: 2 ** 32, size: 4 << 20 }]);
        await frontend.startQueues(2, { size: HOSTILE_RING });
        runHostileDriver(frontend, frontend.memory, steps);
        const sending = Array.from({ length: FRAMES }, () => peer.pairs[0]!.send(new Uint8Array(1514)));
        await Deadline.after(PATIENCE, "frames of the peer").race(Promise.all(sending));
        frontend[Symbol.dispose]();
        await lab.idle(0);
        if (peer.sink.failure !== undefined) throw peer.sink.failure;
      });
      const between = async () => {
        for (const stream of traffic) await stream.progress(1);
        if (!softvf.running) throw new Error(`vfe-softvf ended:\n${softvf.tail()}`);
      };
      await fuzz("network rings", property, { batch: 10, between });
      console.log(`${runs} drivers, seed ${SEED}`);
      expect(await Promise.all(traffic.map((stream) => stream.stop()))).toEqual(traffic.map(() => COMPLETE));
      for (const guest of [here, there, peer]) await guest.checkBuffers();
      // The device itself is as good as new.
      {
        using guest = await lab.boot(0, { pairs: 2 });
        const streams = [guest.stream(0, peer), peer.stream(0, guest)];
        await Promise.all(streams.map((stream) => stream.progress(20)));
        for (const { lost } of await Promise.all(streams.map((stream) => stream.stop()))) expect(lost).toBe(0);
      }
      await lab.idle(0);
      expect(await held()).toEqual(before);
    }
    await Deadline.after(PATIENCE, "own files").poll(() => liveFds() === own || undefined, 10);
  },
  FUZZ_TIMEOUT,
);
