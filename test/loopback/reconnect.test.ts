import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { liveFds } from "../../src/native/fd.ts";
import { usedIndex } from "../../src/virtio/split-ring.ts";
import type { VhostUserFrontend } from "../kit/frontend/frontend.ts";
import { LonelyGuest } from "../kit/frontend/hang-up.ts";
import { MOVERS } from "../kit/movers.ts";
import { RegistryLab } from "../kit/registry-lab.ts";
import { rejection } from "../kit/rejection.ts";
import { type BackgroundIo, VerifiedDisk } from "../kit/verified-disk.ts";

/** A guest whose back-end stops, or is lost and comes back, at any index of its rings and under load. */

const QUEUES = 4;
/** Requests under way on each queue: many enough that a stop always meets some. */
const DEPTH = 8;
/** Blocks of the disk that one queue has for itself. */
const RANGE = 256;

const DEVICES = [
  { device: "fast", options: { slow: 0, "out-of-order": false } },
  { device: "slow", options: { slow: 5, "out-of-order": false } },
  { device: "slow and out of order", options: { slow: 5, "out-of-order": true } },
] as const;

const load = (frontend: VhostUserFrontend): BackgroundIo[] =>
  frontend.queues.map(({ index, driver }) => new VerifiedDisk(index * RANGE, RANGE).runOn(driver, DEPTH));

const progress = (loads: readonly BackgroundIo[]) => Promise.all(loads.map((io) => io.progress(2 * DEPTH)));

/** Used indices as guest memory has them. */
const usedIndices = ({ memory, queues }: VhostUserFrontend): number[] =>
  queues.map(({ driver: { ring } }) => usedIndex(memory, ring));

/** Another connection for the guest of this one, which goes on meanwhile. */
async function reconnect(lab: RegistryLab, frontend: VhostUserFrontend): Promise<VhostUserFrontend> {
  using guest = LonelyGuest.hangUp(frontend);
  using undo = new DisposableStack();
  const next = undo.use(lab.dial());
  await guest.meet(next);
  undo.move();
  return next;
}

describe("a managed VF", () => {
  let lab: RegistryLab;
  beforeAll(async () => {
    lab = await RegistryLab.create({ softvf: ["--queues", `${QUEUES}`] });
    await lab.registry.addPf(lab.pf);
    await lab.serve();
  }, 30_000);
  afterAll(async () => {
    await lab?.[Symbol.asyncDispose]();
  });

  for (const freeze of ["drain", "list", "hold"] as const) {
    for (const { device, options } of DEVICES) {
      for (const queues of [1, QUEUES]) {
        test(`--freeze ${freeze}, ${device}, queues: ${queues}: nothing is lost or done twice`, async () => {
          await lab.idle();
          const idle = liveFds();
          await lab.set(lab.pf, { freeze });
          await lab.set(lab.vf, options);
          const before = await lab.stats();
          {
            // The indices pass 65535 while all this happens.
            const firstIndex = 0x10000 - 3 * DEPTH;
            using first = lab.dial();
            await lab.run(first, queues, firstIndex);
            const loads = load(first);
            await progress(loads);
            for (const order of ["old", "new"] as const) {
              const bases = await first.stop({ order });
              expect(bases).toEqual(usedIndices(first));
              await Bun.sleep(10);
              expect(usedIndices(first)).toEqual(bases);
              await first.resumeQueues(bases);
              await progress(loads);
            }
            using second = await reconnect(lab, first);
            await progress(loads);
            using third = await reconnect(lab, second);
            await progress(loads);
            await third.stop({ order: "old" });
            using last = await reconnect(lab, third);
            await progress(loads);
            await Promise.all(loads.map((io) => io.stop()));

            const after = await lab.stats();
            for (const { index, driver } of last.queues) {
              expect(driver.returned).toBe(driver.submitted);
              expect(after[index]!.completed - before[index]!.completed).toBe(driver.submitted);
              expect(usedIndex(last.memory, driver.ring)).toBe((firstIndex + driver.submitted) & 0xffff);
              expect(firstIndex + driver.submitted).toBeGreaterThan(0x10000);
            }
            expect(after.map(({ bad }) => bad)).toEqual(before.map(({ bad }) => bad));
          }
          await lab.idle();
          expect(liveFds()).toBe(idle);
        }, 30_000);
      }
    }
  }

  for (const when of ["before", "after"]) {
    test(`a lone request from ${when} the hang-up is answered after it`, async () => {
      await lab.idle();
      await lab.set(lab.vf, { slow: 50, "out-of-order": false });
      using first = lab.dial();
      await lab.run(first, 1, 0xffff);
      const { driver } = first.queues[0]!;
      const disk = new VerifiedDisk();
      await disk.step(driver);
      const request = when === "before" ? disk.step(driver) : undefined;
      // Taken by the device, and given back when nobody listens.
      await Bun.sleep(10);
      using guest = LonelyGuest.hangUp(first);
      await lab.idle();
      const late = request ?? disk.step(driver);
      using next = lab.dial();
      await guest.meet(next);
      await late;
    }, 30_000);
  }

  test("any index is one to begin at, to stop at, and to come back to", async () => {
    await lab.set(lab.vf, { slow: 0, "out-of-order": false });
    for (const index of [0, 1, 127, 128, 0x7fff, 0x8000, 0xfffe, 0xffff]) {
      using first = lab.dial();
      await lab.run(first, 1, index);
      const [queue] = first.queues;
      const disk = new VerifiedDisk();
      // Stopped before anything was asked for, too.
      for (let steps = 0; steps < 3; steps++) {
        await disk.steps(queue!.driver, steps);
        const bases = await first.stop({ order: "new" });
        expect(bases).toEqual([(index + disk.verified) & 0xffff]);
        await first.resumeQueues(bases);
      }
      using second = await reconnect(lab, first);
      await disk.steps(queue!.driver, 2);
      expect(usedIndices(second)).toEqual([(index + disk.verified) & 0xffff]);
    }
  }, 30_000);
});

describe("a device that does not give back in time what it has taken", () => {
  let lab: RegistryLab;
  beforeAll(async () => {
    lab = await RegistryLab.create({ deadlines: { drain: 50 } });
    await lab.registry.addPf(lab.pf);
    await lab.serve();
  }, 30_000);
  afterAll(async () => {
    await lab?.[Symbol.asyncDispose]();
  });

  const CASES = [
    ["drain", "hang-up"],
    ["list", "stop"],
    ["hold", "hang-up"],
  ] as const;
  for (const [freeze, stopped] of CASES) {
    test(`--freeze ${freeze}, ${stopped}: some came back, nobody knows which did not, so the rings do not go on`, async () => {
      await lab.idle();
      await lab.set(lab.pf, { freeze });
      await lab.set(lab.vf, { slow: 0, "out-of-order": true });
      using first = lab.dial();
      await lab.run(first);
      const loads = load(first);
      await progress(loads);
      await lab.set(lab.vf, { slow: 200 });
      // Long enough for some to be overtaken.
      await Bun.sleep(500);
      if (stopped === "stop") await rejection(first.stop({ order: "new" }));
      using guest = LonelyGuest.hangUp(first);
      await lab.idle();
      const why = "which requests were open is not known";
      expect(lab.registry.vfInfo(lab.vf).reason).toContain(stopped === "stop" ? lab.vf : why);
      await lab.set(lab.vf, { slow: 0 });
      using second = lab.dial();
      await rejection(guest.meet(second));
      second[Symbol.dispose]();
      await Promise.all(loads.map((io) => io.abandon()));
      await lab.idle();
      expect(lab.registry.vfInfo(lab.vf).reason).toContain(why);
      // Also not when it is tried again, or after a restart of the daemon; but with new rings.
      await lab.registry.abandon();
      lab.registry = lab.newRegistry();
      await lab.registry.revive();
      using third = lab.dial();
      await rejection(lab.run(third, 1, 9));
      using fourth = lab.dial();
      await lab.run(fourth);
      await new VerifiedDisk().steps(fourth.queues[0]!.driver, 5);
    }, 30_000);
  }

  test("none came back, so they are asked for again", async () => {
    await lab.idle();
    await lab.set(lab.vf, { slow: 60_000, "out-of-order": true });
    using first = lab.dial();
    await lab.run(first, 1, 0xfffc);
    const loads = load(first);
    await Bun.sleep(50);
    using second = await reconnect(lab, first);
    await lab.set(lab.vf, { slow: 0 });
    await progress(loads);
    await Promise.all(loads.map((io) => io.stop()));
    for (const { driver } of second.queues) expect(driver.returned).toBe(driver.submitted);
  }, 30_000);
});

describe.each(MOVERS)("moved by $mover", ({ mover, migration }) => {
  const REFUSED = "was reset and can only begin at 0";

  test("a ring that has been in use goes on only where the PF can restore it", async () => {
    await using lab = await RegistryLab.create({ migration });
    await lab.registry.addPf(lab.pf);
    await lab.serve();
    using first = lab.dial();
    await lab.run(first);
    const disk = new VerifiedDisk();
    const { driver } = first.queues[0]!;
    await disk.steps(driver, 7);
    using guest = LonelyGuest.hangUp(first);
    expect(guest.bases).toEqual([7]);
    using second = lab.dial();
    if (mover === "vendor") {
      await guest.meet(second);
      await disk.steps(driver, 7);
      return;
    }
    await guest.meet(second).catch(() => {});
    await second.hungUp();
    await lab.idle();
    expect(lab.registry.vfInfo(lab.vf).reason).toContain(REFUSED);
    expect(lab.registry.vfInfo(lab.vf).reason).toContain("queue 0 is to resume at index 7");
    // The guest's driver starts anew.
    using third = lab.dial();
    await lab.run(third);
    await disk.verifyAll(third.queues[0]!.driver);
  }, 30_000);
});
