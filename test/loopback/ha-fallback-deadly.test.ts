import { expect, test } from "bun:test";
import { join } from "node:path";
import { Deadline } from "../../src/base/deadline.ts";
import { type DaemonOptions, HaLab } from "../kit/ha-lab.ts";
import { SteppedGuest } from "../kit/ha-steps.ts";

/** Milliseconds. */
const DEATH_TIMEOUT = 20_000;

/** A daemon that dies of the record of the first VF. */
function deadly(lab: HaLab, stage: string): DaemonOptions {
  const program = [process.execPath, join(import.meta.dir, "../kit/deadly-record-daemon.ts")];
  return { program, environment: { VFE_DEADLY_VF: lab.vfAt(0), VFE_DEADLY_STAGE: stage } };
}

/** Starts one daemon after the other until one does not die. @returns how many have */
async function deathsOf(lab: HaLab, stage: string): Promise<number> {
  await lab.daemon.kill();
  for (let deaths = 0; deaths < 10; deaths++) {
    const daemon = lab.spawnDaemon(deadly(lab, stage));
    const lives = lab.takenUp().then(
      () => true,
      () => false,
    );
    if (await Promise.race([lives, daemon.exited.then(() => false)])) return deaths;
    await Deadline.after(DEATH_TIMEOUT, "death of the daemon").race(daemon.exited);
  }
  throw new Error(`daemons die for ever\n${lab.story}`);
}

test.each(["open", "take up"])(
  "a record that kills each daemon that takes it up (%s): the fourth goes on without it, and shows it until it is removed",
  async (stage) => {
    await using lab = await HaLab.create({ queues: 2 });
    await lab.startDaemon();
    await lab.addPf();
    using guest = await SteppedGuest.start(lab);
    using other = await SteppedGuest.start(lab, 1);
    try {
      await guest.rest();
      expect(await deathsOf(lab, stage)).toBe(3);
      await guest.frontend.hungUp();
      const reason = /the daemon has died 3 times in a row while it took up vf\/.*; report it/;
      expect((await lab.vfIs("failed")).reason).toMatch(reason);
      await other.isHeard();
      // Also those that come later know of it.
      for (let restart = 0; restart < 2; restart++) {
        await lab.replaceDaemon(deadly(lab, stage));
        await lab.takenUp();
        expect(await lab.vf()).toMatchObject({ state: "failed", reason: expect.stringMatching(reason) });
      }
      await lab.removeVf();
      await lab.addVf();
      await guest.meetNext();
      await guest.move();
      // What it has died of before says nothing of what is there now.
      await lab.replaceDaemon();
      await lab.takenUp();
      await guest.isHeard();
      await other.isHeard();
      for (const one of [guest, other]) await one.end();
      expect(other.reconnects).toBe(0);
      expect(await lab.call("stats")).toMatchObject({ vfs: 2, sessions: 2, protected: true });
    } catch (cause) {
      throw new Error(lab.story, { cause });
    }
  },
  120_000,
);

test("one that was removed after it had failed is not there any more after a restart", async () => {
  await using lab = await HaLab.create({ queues: 2 });
  await lab.startDaemon();
  await lab.addPf();
  await lab.addVf();
  expect(await deathsOf(lab, "take up")).toBe(3);
  await lab.vfIs("failed");
  await lab.removeVf();
  await lab.replaceDaemon();
  await lab.takenUp();
  expect(await lab.call("vf.list")).toEqual({ vfs: [], left: [] });
}, 60_000);

test("daemons that end in order while they take it up have not died of it: it goes on as it was left", async () => {
  await using lab = await HaLab.create({ queues: 2 });
  await lab.startDaemon();
  await lab.addPf();
  using guest = await SteppedGuest.start(lab);
  await lab.daemon.kill();
  for (let round = 0; round < 4; round++) {
    await lab.startDaemon(deadly(lab, "hang"));
    await Deadline.after(DEATH_TIMEOUT, "a take-up that hangs").poll(async () => {
      const { left } = await lab.call<{ left: unknown[] }>("vf.list");
      return left.length === 1 || undefined;
    }, 20);
    lab.daemon.signal("SIGTERM");
    expect(await Deadline.after(DEATH_TIMEOUT, "end of the daemon").race(lab.daemon.exited)).toBe(0);
  }
  await lab.startDaemon();
  await lab.takenUp();
  await guest.isHeard();
  await guest.end();
  expect(guest.reconnects).toBe(0);
}, 120_000);
