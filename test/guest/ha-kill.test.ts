import { expect, test } from "bun:test";
import { Deadline } from "../../src/base/deadline.ts";
import { atLength } from "../kit/at-length.ts";
import { Dice } from "../kit/dice.ts";
import { type Holdings, holdings, residentSize } from "../kit/fuzz/holdings.ts";
import { SEED } from "../kit/fuzz.ts";
import { HostileNeighbour } from "../kit/guest/hostile-neighbour.ts";
import { type HostDevices, type MigrationHost, VICTIM_QUEUES } from "../kit/guest/migration-host.ts";
import { MigrationLab } from "../kit/guest/migration-lab.ts";
import { MigrationWork } from "../kit/guest/migration-work.ts";
import { VmmWatch } from "../kit/guest/vmm-watch.ts";

/** Whose the sockets are, and how often the daemon is killed. */
const KILLS: readonly (readonly ["qemu" | "daemon", number])[] = atLength(
  [
    ["qemu", 100],
    ["daemon", 100],
  ],
  [["qemu", 15]],
);
/** Milliseconds from the start of a daemon in which it may be killed: it is served after some hundred. */
const LIFE = 1500;
/** One of so many kills falls into a stop of the VM. */
const STOPS = 4;
/** Milliseconds in which it falls into that. */
const STOP_TIME = 200;
/** Of one guest, under kills. */
const BOOTS = atLength(10, 1);
/** Kills between two looks. */
const STRETCH = 5;
const SESSIONS = 2;
/** Of a heap, bytes. */
const GROWTH = 16 << 20;
/** Milliseconds. */
const [STEADY_TIMEOUT, STOP_TIMEOUT] = [10_000, 40_000];

const PROCESSES = ["daemon", "keeper", "softvf"] as const;
type ProcessName = (typeof PROCESSES)[number];

/** What processes have, and how large they are, bytes. */
interface State {
  readonly files: Readonly<Record<ProcessName, Holdings>>;
  readonly sizes: Readonly<Record<ProcessName, number>>;
}

/** Of the processes of a host where nothing changes. */
async function stateOf({ stack }: MigrationHost): Promise<State> {
  const filesOf = (name: ProcessName) =>
    holdings(stack[name].pid, Deadline.after(STEADY_TIMEOUT, `a steady number of files of the ${name}`));
  const [daemon, keeper, softvf] = [await filesOf("daemon"), await filesOf("keeper"), await filesOf("softvf")];
  const sizeOf = (name: ProcessName) => residentSize(stack[name].pid);
  return {
    files: { daemon, keeper, softvf },
    sizes: { daemon: sizeOf("daemon"), keeper: sizeOf("keeper"), softvf: sizeOf("softvf") },
  };
}

/** How often the guest's card has lost or found its link. */
async function linkChanges({ guest }: MigrationLab): Promise<string> {
  return await guest.run("cat /sys/class/net/eth0/carrier_changes");
}

/** The VM is stopped and goes on. The VMM answers nothing while it waits for a daemon. */
async function stopAndContinue({ guest }: MigrationLab): Promise<void> {
  await guest.vm.qmp.execute("stop", {}, STOP_TIMEOUT);
  await guest.vm.qmp.execute("cont", {}, STOP_TIMEOUT);
}

async function killAtSomeMoment(lab: MigrationLab, dice: Dice): Promise<void> {
  const stops = dice.roll(STOPS) === 0;
  await Bun.sleep(dice.roll(LIFE));
  const stopping = stops ? stopAndContinue(lab) : undefined;
  if (stops) await Bun.sleep(dice.roll(STOP_TIME));
  await lab.source.stack.replaceDaemon();
  await stopping;
}

for (const [listener, kills] of KILLS) {
  test(
    `the daemon is killed ${kills} times at any moment, sockets of the ${listener}: guest and VMM do not notice (seed ${SEED})`,
    async () => {
      const devices: HostDevices = { blk: 2, net: 1, listener, keeper: true, victim: true };
      await using lab = await MigrationLab.create({ ...devices, other: { blk: 1 } });
      await lab.boot();
      const { source, guest } = lab;
      const dice = new Dice(SEED);
      await using work = await MigrationWork.start(lab, devices);
      const watch = await VmmWatch.begin(source, guest);
      const changes = await linkChanges(lab);
      await source.takenUp(SESSIONS);
      const states: State[] = [];
      let messages = 0;
      for (let killed = 0; killed < kills; killed += STRETCH) {
        await using neighbour = await HostileNeighbour.start(source.victimSocket, VICTIM_QUEUES, SEED + killed);
        for (let kill = 0; kill < STRETCH; kill++) await killAtSomeMoment(lab, dice);
        await source.takenUp(SESSIONS);
        watch.unnoticed();
        messages += await neighbour.stop();
        await work.progress();
        states.push(await stateOf(source));
      }
      expect(await linkChanges(lab)).toBe(changes);
      const [early, late] = [states[0]!, states.at(-1)!];
      expect(late.files).toEqual(early.files);
      for (const name of PROCESSES) expect(late.sizes[name] - early.sizes[name]).toBeLessThan(GROWTH);
      const done = await work.stop();
      if (atLength(true, false)) console.log(messages, done, early.sizes, late.sizes);
    },
    atLength(900_000, 170_000),
  );
}

for (const [listener] of KILLS) {
  test(
    `the daemon is killed while a guest boots, sockets of the ${listener} (seed ${SEED})`,
    async () => {
      const devices: HostDevices = { blk: 2, net: 1, listener, keeper: true };
      await using lab = await MigrationLab.create({ ...devices, other: { blk: 1 } });
      await lab.boot();
      const { source, guest } = lab;
      const dice = new Dice(SEED);
      const watch = await VmmWatch.begin(source, guest);
      for (let boot = 0; boot < BOOTS; boot++) {
        let underWay = true;
        const booting = lab.reset().finally(() => {
          underWay = false;
        });
        // It is waited for below.
        booting.catch(() => {});
        while (underWay) {
          await Bun.sleep(dice.roll(LIFE));
          await source.stack.replaceDaemon();
        }
        await booting;
        await source.takenUp(SESSIONS);
        watch.unnoticed();
        await using work = await MigrationWork.start(lab, devices);
        await work.stop();
      }
    },
    atLength(600_000, 170_000),
  );
}

/** Both are killed, and started again, in either order. */
const ORDERS = {
  async "keeper, daemon"({ stack }: MigrationHost) {
    await stack.keeper.kill();
    await stack.daemon.kill();
    await stack.startKeeper();
    await stack.startDaemon();
  },
  async "daemon, keeper"({ stack }: MigrationHost) {
    await stack.daemon.kill();
    await stack.keeper.kill();
    await stack.startDaemon();
    await stack.startKeeper();
  },
} as const;

for (const [listener] of KILLS) {
  test(`the keeper is killed, which nobody notices; both are, sockets of the ${listener}: the VMM connects anew`, async () => {
    const devices: HostDevices = { blk: 2, net: 1, listener, keeper: true };
    await using lab = await MigrationLab.create({ ...devices, other: { blk: 1 } });
    await lab.boot();
    const { source, guest } = lab;
    const { stack } = source;
    await using work = await MigrationWork.start(lab, devices);
    const watch = await VmmWatch.begin(source, guest);
    for (let round = 0; round < atLength(5, 2); round++) {
      await stack.keeper.kill();
      await Deadline.after(10_000, "a daemon without a keeper").poll(
        async () => !(await stack.call<{ protected: boolean }>("stats")).protected || undefined,
        20,
      );
      await work.progress();
      await stack.startKeeper();
      await source.takenUp(SESSIONS);
      await stack.replaceDaemon();
      await source.takenUp(SESSIONS);
      await work.progress();
      watch.unnoticed();
    }
    for (const killBoth of Object.values(ORDERS)) {
      await killBoth(source);
      await source.takenUp(SESSIONS);
      await work.progress();
      await watch.anew();
      // What is kept from now on is as good as before.
      await stack.replaceDaemon();
      await source.takenUp(SESSIONS);
      await work.progress();
      watch.unnoticed();
    }
    await work.stop();
  }, 170_000);
}
