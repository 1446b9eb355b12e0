import { expect, test } from "bun:test";
import { Deadline } from "../../src/base/deadline.ts";
import type { Guest } from "../kit/guest/guest.ts";
import { compareRam } from "../kit/guest/memory-files.ts";
import type { Migration } from "../kit/guest/migration.ts";
import { MigrationLab, whyNoneArrives } from "../kit/guest/migration-lab.ts";
import { MigrationWork } from "../kit/guest/migration-work.ts";

const BOTH = { blk: 1, net: 1 } as const;
const NAMES = ["blk", "net"] as const;

/** Begins a migration that does not come to its end by itself, and has it disturbed. The VM is to go on where it is. */
async function disturbed(
  lab: MigrationLab,
  work: MigrationWork,
  disturb: (migration: Migration, destination: Guest) => Promise<void>,
): Promise<void> {
  const destination = await lab.awaitAt();
  const migration = await lab.begin(destination, "slow");
  await disturb(migration, destination);
  await goesOn(lab, work);
  await lab.discard(destination);
}

/** The VM runs at the source, with all that it works with. */
async function goesOn(lab: MigrationLab, work: MigrationWork): Promise<void> {
  expect(await lab.guest.vm.qmp.execute("query-status")).toMatchObject({ running: true });
  await work.progress();
}

/** Has commands of both PFs at the source go wrong. */
async function setFaults(lab: MigrationLab, faults: string): Promise<void> {
  for (const name of NAMES) await lab.source.setPf(name, `admin-fault=${faults}`);
}

/**
 * Moves the VM, and has the daemon at the destination killed while it is on its way.
 * @param compared with its memory, while it stands still at both hosts
 */
async function arriveAlone(lab: MigrationLab, compared: boolean): Promise<void> {
  const destination = await lab.awaitAt(lab.destination, compared ? ["-S"] : []);
  const migration = await lab.begin(destination);
  await migration.passed(1);
  await lab.destination.killDaemon();
  await migration.passed();
  await migration.complete();
  if (compared) {
    const { differences } = await compareRam(lab.guest.vm.qemu.pid, destination.vm.qemu.pid);
    expect(differences).toEqual([]);
    await destination.vm.qmp.execute("cont");
  }
  await lab.arrived(destination);
}

async function awaitLog(lab: MigrationLab, pattern: RegExp, count: number): Promise<void> {
  await Deadline.after(20_000, `"${pattern.source}" in the log of the daemon at the source`).poll(
    () => [...lab.source.stack.daemon.log.matchAll(pattern)].length >= count || undefined,
    20,
  );
}

const missing = await whyNoneArrives();
const reason = missing === undefined ? "" : ` [skip: ${missing}]`;

test("a migration that does not come to its end: the VM goes on at the source, nothing is lost or done twice", async () => {
  await using lab = await MigrationLab.create(BOTH);
  await lab.boot();
  await using work = await MigrationWork.start(lab, BOTH);
  // Cancelled: at some moment, and in the second pass.
  await disturbed(lab, work, async (migration) => {
    await Bun.sleep(Math.random() * 1000);
    expect((await migration.cancel()).status).toBe("cancelled");
  });
  await disturbed(lab, work, async (migration) => {
    await migration.passed(1);
    expect((await migration.cancel()).status).toBe("cancelled");
  });
  await disturbed(lab, work, async (migration, destination) => {
    await migration.passed(1);
    await destination.vm.kill();
    expect((await migration.over()).status).toBe("failed");
  });
  await disturbed(lab, work, async (migration) => {
    await migration.passed(1);
    await lab.destination.killDaemon();
    expect((await migration.cancel()).status).toBe("cancelled");
  });
  await lab.destination.startDaemon();
  // Nothing can be marked: the devices are stopped, and run again when the VMM does not ask for it any more.
  await setFaults(lab, "start-tracking:fail");
  await disturbed(lab, work, async (migration) => {
    await awaitLog(lab, /not every page that it writes is marked: .* refused startTracking/g, NAMES.length);
    expect((await migration.cancel()).status).toBe("cancelled");
  });
  await setFaults(lab, "");
  const done = await work.stop();
  expect(done.diskRounds).toBeGreaterThan(0);
}, 180_000);

test.skipIf(missing !== undefined)(
  `a source whose device answers a freeze with an error, or not at all: the VM is not harmed${reason}`,
  async () => {
    await using lab = await MigrationLab.create({ ...BOTH, arrives: true });
    await lab.boot();
    await using work = await MigrationWork.start(lab, BOTH);
    /**
     * Migrates while the devices refuse to stop. The VMM gives the migration up, where the daemon has found no other way.
     * @returns whether the VM is still at its source
     */
    const refused = async (fault: string): Promise<boolean> => {
      const { source } = lab;
      for (const name of NAMES) await source.setPf(name, `admin-fault=${fault}`);
      const destination = await lab.awaitAt();
      const migration = await lab.begin(destination);
      await migration.passed();
      const { status, error } = await migration.end();
      for (const name of NAMES) await source.setPf(name, "admin-fault=");
      if (status === "completed") {
        await lab.arrived(destination);
        return false;
      }
      expect(error).toContain("Failed to stop the VM");
      await lab.discard(destination);
      return true;
    };
    await refused("modify:fail");
    await goesOn(lab, work);

    await setFaults(lab, "modify:retry:1");
    await lab.migrate();
    await setFaults(lab, "");
    await work.progress();

    const stayed = await refused("modify:silence:1");
    // A command that was never answered may still do something, until the operator gives the PF back.
    if (stayed) for (const name of NAMES) await lab.source.renew(name);
    await goesOn(lab, work);
    const done = await work.stop();
    expect(done.diskRounds).toBeGreaterThan(0);
  },
  240_000,
);

for (const listener of ["qemu", "daemon"] as const) {
  test.skipIf(missing !== undefined)(
    `the daemon at the destination is gone when the VM arrives, sockets of the ${listener}: all goes on with the next one${reason}`,
    async () => {
      await using lab = await MigrationLab.create({ ...BOTH, listener, arrives: true });
      await lab.boot();
      await using work = await MigrationWork.start(lab, BOTH);
      for (const compared of [true, false]) {
        await arriveAlone(lab, compared);
        await work.devicesStand();
        // Reads and writes that wait.
        expect(await lab.guest.run("cat /sys/block/vda/inflight")).not.toMatch(/^ *0 +0$/);
        await lab.source.startDaemon();
        await work.progress();
        for (const name of NAMES)
          expect(await lab.source.vfInfo(name)).toMatchObject({ migration: { state: "arrived" } });
      }
      // What the guest said when it arrived has gone nowhere.
      const { arp } = await work.announcements();
      await lab.guest.vm.qmp.execute("announce-self", { initial: 50, max: 100, rounds: 2, step: 50 });
      await Deadline.after(20_000, "announcements of the guest").poll(
        async () => (await work.announcements()).arp > arp || undefined,
        50,
      );
      const done = await work.stop();
      expect(done.diskRounds).toBeGreaterThan(0);
    },
    180_000,
  );
}

test("hosts that do not match: refused before the VM is moved", async () => {
  const devices = { blk: 2, net: 2 };
  await using lab = await MigrationLab.create(devices);
  await lab.boot();
  await using work = await MigrationWork.start(lab, devices);
  for (const [fewer, reason] of [
    [{ blk: 1, net: 2 }, /queues? supported/],
    [{ blk: 2, net: 1 }, /more queues than supported/],
  ] as const) {
    await lab.replaceDestination(fewer);
    const destination = await lab.awaitAt();
    await destination.vm.qemu.line(reason, 20_000).catch((error: unknown) => {
      if (!reason.test(destination.vm.qemu.log)) throw error;
    });
    await lab.discard(destination);
  }
  await goesOn(lab, work);
  await work.stop();
}, 120_000);

test("a source that cannot say what it writes: its VMM does not begin to move the VM", async () => {
  const options = { tracking: "none" };
  await using lab = await MigrationLab.create({ ...BOTH, options: { blk: options, net: options } });
  await lab.boot();
  const destination = await lab.awaitAt();
  const refusal = await lab.begin(destination).then(
    () => "",
    (error: Error) => error.message,
  );
  expect(refusal).toMatch(/Migration disabled: .*LOG_(SHMFD|ALL)/);
  expect(await lab.guest.run("echo runs")).toBe("runs");
}, 60_000);
