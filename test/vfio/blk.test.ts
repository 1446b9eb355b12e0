import { afterAll, beforeAll, expect, test } from "bun:test";
import { signalEventfd } from "../../src/native/sys.ts";
import { Request } from "../../src/vhost-user/messages.ts";
import { atLength } from "../kit/at-length.ts";
import { DiskLoad, PLAIN_RINGS } from "../kit/disk-load.ts";
import { u64, type VhostUserFrontend } from "../kit/frontend/frontend.ts";
import { LonelyGuest } from "../kit/frontend/hang-up.ts";
import { MACHINE_TEST_TIMEOUT, MachineLab } from "../kit/machine/lab.ts";
import { VerifiedDisk } from "../kit/verified-disk.ts";

/** A disk of this machine, reached through the kernel's VFIO, and a front-end of our own. */

const QUEUES = 2;
const DEPTH = 8;
const REQUESTS = atLength(100_000, 10_000);
const MEMORY = [
  { gpa: 0, size: 2 << 20 },
  { gpa: 2 ** 32, size: 8 << 20 },
];

let lab: MachineLab;
let blk: string;

beforeAll(async () => {
  lab = await MachineLab.create();
  [blk] = lab.bind("blk1");
  await lab.add(blk);
}, MACHINE_TEST_TIMEOUT);
afterAll(async () => {
  await lab?.[Symbol.asyncDispose]();
}, MACHINE_TEST_TIMEOUT);

async function start(): Promise<VhostUserFrontend> {
  await lab.reaches(blk, "idle");
  using undo = new DisposableStack();
  const frontend = undo.use(lab.dial(blk));
  await frontend.negotiate();
  await frontend.setupMemory(MEMORY);
  await frontend.startQueues(QUEUES);
  undo.move();
  return frontend;
}

const load = ({ queues }: VhostUserFrontend) =>
  queues.map(({ index, driver }) => new VerifiedDisk(index * 256, 256).runOn(driver, DEPTH));

test("what vf.info says of it", async () => {
  expect(await lab.info(blk)).toMatchObject({
    class: "blk",
    pf: null,
    state: "idle",
    mover: "registers",
    queue_num: QUEUES,
  });
});

test(
  `${REQUESTS} verified requests on two queues, kicks and calls by eventfds`,
  async () => {
    using frontend = lab.dial(blk);
    await frontend.negotiate({ features: PLAIN_RINGS });
    await frontend.setupMemory(MEMORY);
    using load = await DiskLoad.start(frontend, QUEUES);
    await load.run(REQUESTS, 150_000);
    expect(load.verified).toBeGreaterThan(REQUESTS);
    for (const queue of load.queues) expect(queue.calls).toBeGreaterThan(0);
  },
  MACHINE_TEST_TIMEOUT,
);

for (const order of ["old", "new"] as const) {
  test(
    `stop and cont under load, ${order} order: goes on where it was`,
    async () => {
      using frontend = await start();
      const loads = load(frontend);
      for (let round = 0; round < 3; round++) {
        await Promise.all(loads.map((io) => io.progress(4 * DEPTH)));
        for (const io of loads) io.pause();
        const before = frontend.queues.map(({ driver }) => driver.returned);
        const bases = await frontend.stop({ order });
        for (const { index, driver } of frontend.queues) {
          expect(bases[index]).toBeGreaterThanOrEqual(before[index]!);
          driver.collect();
          expect(driver.returned).toBe(driver.submitted);
          expect(driver.returned & 0xffff).toBe(bases[index]!);
        }
        await frontend.resumeQueues(bases);
        for (const io of loads) io.resume();
      }
      await Promise.all(loads.map((io) => io.progress(4 * DEPTH)));
      for (const io of loads) expect(await io.stop()).toBeGreaterThan(12 * DEPTH);
      expect(lab.takeFaults()).toEqual([]);
    },
    MACHINE_TEST_TIMEOUT,
  );
}

test(
  "the call eventfd of one queue is replaced while the other's requests run",
  async () => {
    using frontend = await start();
    const [io, other] = load(frontend);
    const [queue] = frontend.queues;
    for (let round = 0; round < 5; round++) {
      await Promise.all([io!.progress(DEPTH), other!.progress(DEPTH)]);
      queue!.driver.rewire(() => signalEventfd(queue!.kick.number));
      expect(await frontend.command(Request.SET_VRING_CALL, u64(0n), [queue!.driver.call.number])).toBe(0n);
      // What the device signalled between the two.
      queue!.driver.collect();
    }
    const calls = queue!.driver.calls;
    await Promise.all([io!.progress(DEPTH), other!.progress(DEPTH)]);
    await Promise.all([io!.stop(), other!.stop()]);
    expect(queue!.driver.calls).toBeGreaterThan(calls);
  },
  MACHINE_TEST_TIMEOUT,
);

test(
  "a front-end that comes back to used rings is told that they cannot go on; with new ones its data is there",
  async () => {
    const disk = new VerifiedDisk();
    {
      using first = await start();
      await disk.steps(first.queues[0]!.driver, 20);
      using guest = LonelyGuest.hangUp(first);
      expect(guest.bases).toEqual([20, 0]);
      await lab.reaches(blk, "idle");
      using second = lab.dial(blk);
      await guest.meet(second).catch(() => {});
      await second.hungUp();
      expect((await lab.reaches(blk, "idle")).reason).toContain("queue 0 is to resume at index 20");
    }
    using third = await start();
    await disk.verifyAll(third.queues[0]!.driver);
  },
  MACHINE_TEST_TIMEOUT,
);

test(
  "sessions one after the other under load leave no fd and no fault behind",
  async () => {
    const fds = async () => ((await lab.call("stats")) as { readonly fds: number }).fds;
    const session = async () => {
      using frontend = await start();
      const loads = load(frontend);
      await Promise.all(loads.map((io) => io.progress(DEPTH)));
      // Hung up in the middle of everything.
      frontend[Symbol.dispose]();
      await Promise.all(loads.map((io) => io.abandon()));
    };
    await session();
    await lab.reaches(blk, "idle");
    const before = await fds();
    for (let round = 0; round < 4; round++) await session();
    await lab.reaches(blk, "idle");
    expect(await fds()).toBe(before);
    expect(lab.takeFaults()).toEqual([]);
  },
  MACHINE_TEST_TIMEOUT,
);
