import { expect, test } from "bun:test";
import { atLength } from "../kit/at-length.ts";
import { Dice } from "../kit/dice.ts";
import { SEED } from "../kit/fuzz.ts";
import { compareRam } from "../kit/guest/memory-files.ts";
import type { HostDevices } from "../kit/guest/migration-host.ts";
import { MigrationLab, whyNoneArrives } from "../kit/guest/migration-lab.ts";
import { MigrationWork } from "../kit/guest/migration-work.ts";
import { VmmWatch } from "../kit/guest/vmm-watch.ts";

/** Whose the sockets are, and how often daemons are killed in all migrations. */
const KILLS: readonly (readonly ["qemu" | "daemon", number])[] = atLength(
  [
    ["qemu", 13],
    ["daemon", 12],
  ],
  [["qemu", 3]],
);
/** At most, in one of them. */
const OF_ONE = 3;
/** Milliseconds between two of them, at most: a migration takes twice that and more. */
const INTERVAL = 2500;
const PASSES = 3;
const SESSIONS = 2;
const missing = await whyNoneArrives();
const reason = missing === undefined ? "" : ` [skip: ${missing}]`;

/**
 * Moves the VM, has daemons of both hosts killed while it is on its way, and compares its memory at both.
 * @param most kills
 * @returns how many there were before it had arrived
 */
async function moveUnderKills(lab: MigrationLab, dice: Dice, most: number): Promise<number> {
  const { source, destination: host, guest } = lab;
  const destination = await lab.awaitAt(host, ["-S"]);
  const watches = [await VmmWatch.begin(source, guest), await VmmWatch.begin(host, destination)];
  const migration = await lab.begin(destination);
  let underWay = true;
  const moving = (async () => {
    try {
      await migration.passed(PASSES);
      await migration.complete();
    } finally {
      underWay = false;
    }
  })();
  // It is waited for below.
  moving.catch(() => {});
  let kills = 0;
  for (; kills < most; kills++) {
    await Bun.sleep(dice.roll(INTERVAL));
    if (!underWay) break;
    await dice.pick([source, host]).stack.replaceDaemon();
  }
  try {
    await moving;
  } catch (error) {
    throw new Error(`${error}\nsource:\n${source.stack.story}\ndestination:\n${host.stack.story}`, { cause: error });
  }
  for (const one of [source, host]) await one.takenUp(SESSIONS);
  for (const watch of watches) watch.unnoticed();
  const { differences, used } = await compareRam(guest.vm.qemu.pid, destination.vm.qemu.pid);
  expect(differences).toEqual([]);
  expect(used).toBeGreaterThan(1000);
  await lab.arrived(destination);
  await destination.vm.qmp.execute("cont");
  return kills;
}

for (const [listener, kills] of KILLS) {
  test.skipIf(missing !== undefined)(
    `daemons of both hosts are killed ${kills} times while a VM is moved, sockets of the ${listener}: nothing is missing where it arrives (seed ${SEED})${reason}`,
    async () => {
      const devices: HostDevices = { blk: 1, net: 1, listener, keeper: true };
      await using lab = await MigrationLab.create({ ...devices, arrives: true });
      await lab.boot();
      await using work = await MigrationWork.start(lab, devices);
      const dice = new Dice(SEED);
      let moves = 0;
      for (let left = kills; left > 0; moves++) {
        left -= await moveUnderKills(lab, dice, Math.min(left, OF_ONE));
        await work.progress();
      }
      const done = await work.stop();
      if (atLength(true, false)) console.log(`${moves} moves`, done);
    },
    atLength(600_000, 170_000),
  );
}
