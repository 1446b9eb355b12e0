import { expect, test } from "bun:test";
import { atLength } from "../kit/at-length.ts";
import { Dice } from "../kit/dice.ts";
import { SEED } from "../kit/fuzz.ts";
import { compareRam } from "../kit/guest/memory-files.ts";
import type { MigrationStatus } from "../kit/guest/migration.ts";
import type { HostDevices } from "../kit/guest/migration-host.ts";
import { MigrationLab, whyNoneArrives } from "../kit/guest/migration-lab.ts";
import { MigrationWork } from "../kit/guest/migration-work.ts";

/** Devices of the VM, and how often it is moved: 25 times in all, every combination at least once. */
const MOVES: readonly (readonly [HostDevices, number])[] = atLength(
  [
    [{ blk: 1 }, 4],
    [{ blk: 4 }, 4],
    [{ net: 1 }, 4],
    [{ net: 4 }, 4],
    [{ blk: 1, net: 1 }, 5],
    [{ blk: 4, net: 4 }, 4],
  ],
  [
    [{ blk: 1, net: 1 }, 2],
    [{ blk: 4, net: 4 }, 2],
  ],
);
/** Of ten; in the long form some migrations are given up first, which the seed decides. */
const CANCELS = atLength(4, 0);
const seeded = atLength(` (seed ${SEED})`, "");
const PASSES = 3;
const missing = await whyNoneArrives();
const reason = missing === undefined ? "" : ` [skip: ${missing}]`;

/** Moves the VM, and compares its memory at both hosts while it stands still: nothing may be missing at the destination. */
async function moveAndCompare(lab: MigrationLab): Promise<MigrationStatus> {
  const destination = await lab.awaitAt(lab.destination, ["-S"]);
  const migration = await lab.begin(destination);
  await migration.passed(PASSES);
  const ended = await migration.complete();
  const { differences, used } = await compareRam(lab.guest.vm.qemu.pid, destination.vm.qemu.pid);
  expect(differences).toEqual([]);
  expect(used).toBeGreaterThan(1000);
  await lab.arrived(destination);
  await destination.vm.qmp.execute("cont");
  return ended;
}

/** Gives a migration up at some moment. */
async function giveUp(lab: MigrationLab, dice: Dice): Promise<void> {
  const destination = await lab.awaitAt();
  const migration = await lab.begin(destination, "slow");
  await Bun.sleep(dice.roll(2000));
  expect((await migration.cancel()).status).toBe("cancelled");
  await lab.discard(destination);
}

for (const [index, [devices, moves]] of MOVES.entries()) {
  const names = Object.entries(devices).map(([name, queues]) => `${name} with ${queues}`);
  test.skipIf(missing !== undefined)(
    `a VM is moved ${moves} times under load, there and back: ${names.join(" and ")}${seeded}${reason}`,
    async () => {
      await using lab = await MigrationLab.create({ ...devices, arrives: true });
      await lab.boot();
      await using work = await MigrationWork.start(lab, devices);
      const dice = new Dice(SEED + index);
      const figures: MigrationStatus[] = [];
      for (let move = 0; move < moves; move++) {
        if (dice.roll(10) < CANCELS) {
          await giveUp(lab, dice);
          await work.progress();
        }
        const announced = await work.announcements();
        // Every second one is not held up for the comparison.
        figures.push(await (move % 2 === 0 ? moveAndCompare(lab) : lab.migrate()));
        await work.progress();
        if (devices.net !== undefined) {
          const { arp, rarp } = await work.announcements();
          expect(arp + rarp).toBeGreaterThan(announced.arp + announced.rarp);
        }
      }
      const done = await work.stop();
      expect(figures.map(({ syncs }) => syncs > PASSES)).not.toContain(false);
      if (atLength(true, false)) console.log(names.join(", "), done, figures);
    },
    280_000,
  );
}
