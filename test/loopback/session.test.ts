import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { Request, VRING_STATE } from "../../src/vhost-user/messages.ts";
import { blkResult, flushRequest } from "../kit/blk-requests.ts";
import { VhostUserFrontend } from "../kit/frontend/frontend.ts";
import { MOVERS } from "../kit/movers.ts";
import { acceptFrontend, DISK_SIZE, Machine, startDisk, verify, writeAndVerify } from "./session-machine.ts";

/** Our own front-end against the daemon as a process, its VFs served by vfe-softvf. */

const QUEUES = 4;
const CLIENT = 0;
const SERVER = 1;

type QueueCounts = readonly Readonly<Record<"queue" | "received" | "completed" | "bad" | "bytes", number>>[];

describe.each(MOVERS)("moved by $mover", ({ mover, migration }) => {
  let machine: Machine;

  beforeAll(async () => {
    machine = await Machine.start({ vfs: 2, queues: QUEUES, migration });
    await machine.addVf(CLIENT, "client");
    await machine.addVf(SERVER, "server");
    expect(await machine.call("vf.info", { device: machine.address(CLIENT) })).toMatchObject({ mover });
    // What the daemon opens with its first session stays open.
    using first = await acceptFrontend(machine, CLIENT);
    await startDisk(first, QUEUES);
    await writeAndVerify(first.queues[0]!, 0);
  }, 30_000);
  afterAll(async () => {
    await machine?.[Symbol.asyncDispose]();
  });

  describe("I/O through a VF", () => {
    test("four queues at once, the daemon as client", async () => {
      using frontend = await acceptFrontend(machine, CLIENT);
      await startDisk(frontend, QUEUES);
      const work = frontend.queues.flatMap((queue) =>
        Array.from({ length: 16 }, (_, n) => writeAndVerify(queue, (queue.index * 16 + n) * 8)),
      );
      await Promise.all(work);
      const flushed = flushRequest();
      expect(blkResult(await frontend.queues[0]!.driver.request(flushed.readable, flushed.writable)).status).toBe(0);
    });

    test("one queue, the daemon as server; a second connection is refused meanwhile", async () => {
      using frontend = VhostUserFrontend.connect(machine.socket(SERVER));
      await startDisk(frontend, 1);
      await writeAndVerify(frontend.queues[0]!, 0);
      using second = VhostUserFrontend.connect(machine.socket(SERVER));
      await second.hungUp();
      await writeAndVerify(frontend.queues[0]!, 8);
    });

    for (const order of ["old", "new"] as const) {
      test(`stop and cont, ${order} order, goes on where it was`, async () => {
        using frontend = await acceptFrontend(machine, CLIENT);
        await startDisk(frontend, QUEUES);
        let requests = 0;
        for (let round = 0; round < 3; round++) {
          await Promise.all(frontend.queues.map((queue) => writeAndVerify(queue, 1000 + queue.index * 8)));
          requests += 2;
          const bases = await frontend.stop({ order });
          expect(bases).toEqual(frontend.queues.map(() => requests));
          // What the guest makes available while it is stopped is served after cont.
          const waiting = frontend.queues.map((queue) => verify(queue, 1000 + queue.index * 8));
          await frontend.resumeQueues(bases);
          await Promise.all(waiting);
          requests += 1;
        }
      });
    }

    test("the guest reboots into fewer queues", async () => {
      using frontend = await acceptFrontend(machine, CLIENT);
      await startDisk(frontend, QUEUES);
      await writeAndVerify(frontend.queues[3]!, 64);
      await frontend.stop({ order: "old" });
      await frontend.startQueues(1, { size: 32 });
      await verify(frontend.queues[0]!, 64);
    });

    test("a disabled ring is not served, goes on where it was, and disturbs no other", async () => {
      using frontend = await acceptFrontend(machine, CLIENT);
      await startDisk(frontend, QUEUES);
      const [first, second] = frontend.queues;
      await writeAndVerify(second!, 256);
      expect(await frontend.enable(1, false)).toBe(0n);
      await machine.daemon.line(/queues 0 2 3 are enabled, of 4/, 5_000);
      let served = false;
      const waiting = verify(second!, 256).then(() => {
        served = true;
      });
      for (let n = 0; n < 10; n++) await writeAndVerify(first!, 512 + 8 * n);
      expect(served).toBe(false);
      expect(await frontend.enable(1, true)).toBe(0n);
      await waiting;
      expect(await frontend.stop({ order: "new" })).toEqual([20, 3, 0, 0]);
    });

    test("rings that are set up and not enabled are served once they are", async () => {
      using frontend = await acceptFrontend(machine, CLIENT);
      frontend.enableAll = (enabled) => frontend.enable(0, enabled).then(() => {});
      await startDisk(frontend, QUEUES);
      const waiting = frontend.queues.slice(1).map((queue) => writeAndVerify(queue, 64 * queue.index));
      await writeAndVerify(frontend.queues[0]!, 0);
      for (const { index } of frontend.queues.slice(1)) await frontend.enable(index, true);
      await Promise.all(waiting);
      expect(await frontend.stop({ order: "new" })).toEqual([2, 2, 2, 2]);
    });

    test("what each queue has done is counted", async () => {
      using frontend = await acceptFrontend(machine, CLIENT);
      const counted = async () => {
        const answer = (await machine.call("vf.info", { device: machine.address(CLIENT) })) as {
          queue_stats: QueueCounts;
        };
        expect(answer.queue_stats.map(({ queue }) => queue)).toEqual([0, 1, 2, 3]);
        return answer.queue_stats[1]!;
      };
      await startDisk(frontend, 2);
      const before = await counted();
      await writeAndVerify(frontend.queues[1]!, 0);
      const after = await counted();
      expect(after.received - before.received).toBe(2);
      expect(after.completed - before.completed).toBe(2);
      expect(after.bad - before.bad).toBe(0);
      expect(after.bytes - before.bytes).toBe(2 * 8 * 512);
      expect(await machine.call("stats", { device: machine.address(CLIENT) })).toHaveProperty("queue_stats.1", after);
    });

    test("memory is plugged and unplugged while I/O runs", async () => {
      using frontend = await acceptFrontend(machine, CLIENT);
      await startDisk(frontend, 1);
      const [queue] = frontend.queues;
      for (let round = 0; round < 5; round++) {
        const region = frontend.memory.add(0x1_0000_0000, 4 << 20);
        const busy = writeAndVerify(queue!, 128 + round * 8);
        expect(await frontend.addRegion(region)).toBe(0n);
        await busy;
        expect(await frontend.removeRegion(region)).toBe(0n);
        frontend.memory.drop(region);
      }
    });

    test("a resized disk is announced, and the new size read", async () => {
      using frontend = await acceptFrontend(machine, CLIENT);
      await startDisk(frontend, 1);
      await machine.setDisk(CLIENT, `size=${2 * DISK_SIZE}`);
      await frontend.backendRequests!.wait(1);
      const config = await frontend.getConfig(0, 57);
      expect(new DataView(config!.slice().buffer).getBigUint64(0, true)).toBe(BigInt((2 * DISK_SIZE) / 512));
      await writeAndVerify(frontend.queues[0]!, DISK_SIZE / 512 + 8);
    });
  });

  describe("front-ends that misbehave or die", () => {
    test("they die with I/O under way, each next one is served, no fd is left", async () => {
      const before = await machine.steadyFds([CLIENT, SERVER]);
      for (let round = 0; round < 8; round++) {
        using frontend = VhostUserFrontend.connect(machine.socket(SERVER));
        await startDisk(frontend, QUEUES);
        await writeAndVerify(frontend.queues[round % QUEUES]!, 8 * round);
        for (const queue of frontend.queues) verify(queue, 8 * round).catch(() => {});
      }
      expect(await machine.steadyFds([CLIENT, SERVER])).toBe(before);
    }, 60_000);

    test("a bad message ends its session with value and limit in the log; another VF's I/O goes on", async () => {
      const before = await machine.steadyFds([CLIENT, SERVER]);
      {
        using good = VhostUserFrontend.connect(machine.socket(SERVER));
        await startDisk(good, 2);
        {
          using bad = await acceptFrontend(machine, CLIENT);
          await startDisk(bad, 2);
          const busy = Promise.all(good.queues.map((queue) => writeAndVerify(queue, 256 + 8 * queue.index)));
          await bad.send(Request.SET_VRING_NUM, VRING_STATE.encode({ index: 200, num: 64 }));
          await bad.hungUp();
          await busy;
        }
        const [line] = await machine.daemon.line(/.*queue index 200 is out of range.*/, 5_000);
        expect(line).toContain(machine.address(CLIENT));
        expect(line).toContain("there are 4 queues");
        await Promise.all(good.queues.map((queue) => verify(queue, 256 + 8 * queue.index)));
      }
      expect(await machine.steadyFds([CLIENT, SERVER])).toBe(before);
      using next = await acceptFrontend(machine, CLIENT);
      await startDisk(next, 1);
      await writeAndVerify(next.queues[0]!, 0);
    });
  });
});
