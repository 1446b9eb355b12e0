import { describe, expect, test } from "bun:test";
import { atLength } from "../kit/at-length.ts";
import { Dice } from "../kit/dice.ts";
import { HaLab } from "../kit/ha-lab.ts";
import { OPERATIONS, type OperationName, SteppedGuest } from "../kit/ha-steps.ts";

const seed = Number(process.env["VFE_TEST_SEED"] ?? Date.now() % 1_000_000);
/** Of each half of an operation: moments to die at. */
const POINTS = atLength(Number.POSITIVE_INFINITY, 2);

type Work = (guest: SteppedGuest) => Promise<void>;

/** How many moments to die an operation has. The daemon is one that never dies by itself. */
async function countSteps(lab: HaLab, guest: SteppedGuest, work: Work): Promise<number> {
  await lab.replaceDaemon({ dieAt: 0 });
  await lab.takenUp();
  lab.daemon.signal("SIGUSR2");
  await lab.daemon.line(/^armed$/m, 5_000);
  await work(guest);
  lab.daemon.signal("SIGUSR2");
  const [, steps] = await lab.daemon.line(/^steps (\d+)$/m, 5_000);
  return Number(steps);
}

/** The daemon dies in the operation, and another one goes on. */
async function dieIn(lab: HaLab, guest: SteppedGuest, work: Work, dieAt: number): Promise<void> {
  await lab.replaceDaemon({ dieAt });
  await lab.takenUp();
  const dying = lab.daemon;
  dying.signal("SIGUSR2");
  await dying.line(/^armed$/m, 5_000);
  const goneOn = guest.survive(() => work(guest));
  // It may have nothing left to do where the load took some of the steps.
  await Promise.race([dying.exited, goneOn.catch(() => {})]);
  if (dying.running) await dying.kill();
  lab.spawnDaemon();
  if (!(await goneOn)) await work(guest);
  await lab.takenUp();
}

describe.each(Object.keys(OPERATIONS) as OperationName[])("%s", (name) => {
  test(
    `the daemon dies at a step of it, and the next one goes on (seed ${seed})`,
    async () => {
      await using lab = await HaLab.create({ queues: 2 });
      const dice = new Dice(seed);
      await lab.startDaemon();
      await lab.addPf();
      using guest = await SteppedGuest.start(lab);
      const { forth, back } = OPERATIONS[name];
      const steps = { forth: await countSteps(lab, guest, forth), back: await countSteps(lab, guest, back) };
      for (const half of ["forth", "back"] as const) {
        const all = Array.from({ length: steps[half] }, (_, index) => index + 1);
        const [wanted, at] = process.env["VFE_TEST_POINT"]?.split(":") ?? [];
        if (at !== undefined && wanted !== half) continue;
        const points =
          at !== undefined
            ? [Number(at)]
            : Number.isFinite(POINTS)
              ? Array.from({ length: POINTS }, () => dice.pick(all))
              : all;
        for (const point of points) {
          if (half === "back") await forth(guest);
          try {
            await dieIn(lab, guest, OPERATIONS[name][half], point);
            if (half === "forth") await back(guest);
            await guest.progress();
          } catch (error) {
            throw new Error(`${half}, step ${point} of ${steps[half]}\n${lab.story}`, { cause: error });
          }
        }
      }
      await guest.end();
      console.log(`${name}: ${JSON.stringify(steps)} steps, ${guest.reconnects} reconnects`);
      expect(await lab.call("stats")).toMatchObject({ vfs: 1, sessions: 1, protected: true });
    },
    atLength(3_600_000, 120_000),
  );
});
