import { expect, test } from "bun:test";
import { Deadline } from "../../src/base/deadline.ts";
import { VhostdError } from "../../src/base/errors.ts";
import { atLength } from "../kit/at-length.ts";
import { Dice } from "../kit/dice.ts";
import { countFds, HaLab } from "../kit/ha-lab.ts";
import { SteppedGuest } from "../kit/ha-steps.ts";

const seed = Number(process.env["VFE_TEST_SEED"] ?? Date.now() % 1_000_000);
/** Of each command: moments to die at. */
const POINTS = atLength(Number.POSITIVE_INFINITY, 3);
const ANY_TIME = 20_000;

/** A command that brings something and one that takes it away, while the daemon may die. */
interface Commands {
  /** Whether it is there. */
  isThere(): Promise<boolean>;
  add(): Promise<void>;
  remove(): Promise<void>;
  /** It is there, and is used. */
  use(): Promise<void>;
}

async function arm(lab: HaLab, dieAt: number): Promise<void> {
  await lab.replaceDaemon({ dieAt });
  await lab.takenUp();
  lab.daemon.signal("SIGUSR2");
  await lab.daemon.line(/^armed$/m, ANY_TIME);
}

async function countSteps(lab: HaLab, command: () => Promise<void>): Promise<number> {
  await arm(lab, 0);
  await command();
  lab.daemon.signal("SIGUSR2");
  const [, steps] = await lab.daemon.line(/^steps (\d+)$/m, ANY_TIME);
  return Number(steps);
}

/** The daemon dies in the command, whose caller learns no more than that; the next one is there afterwards. */
async function dieIn(lab: HaLab, command: () => Promise<void>, dieAt: number): Promise<void> {
  await arm(lab, dieAt);
  const dying = lab.daemon;
  await command().catch((error) => {
    if (!(error instanceof VhostdError && error.code === "connectionLost")) throw error;
  });
  // It may have had less to do this time.
  await dying.kill();
  lab.spawnDaemon();
  await lab.takenUp();
}

/** What keeper and softvf have open is what they had. */
async function holdsNoMore(lab: HaLab, before: readonly number[]): Promise<void> {
  let now: number[] = [];
  await Deadline.after(ANY_TIME, "as few open files as before")
    .poll(async () => {
      now = await openFiles(lab);
      return now.every((count, index) => count <= before[index]!) || undefined;
    }, 10)
    .catch((cause) => {
      throw new Error(`the keeper and softvf have ${now} files open, before it was ${before}`, { cause });
    });
}

function openFiles(lab: HaLab): Promise<number[]> {
  return Promise.all([lab.keeper, lab.softvf].map(({ pid }) => countFds(pid)));
}

/** It is not there at the begin. */
async function dieInEach(name: string, lab: HaLab, commands: Commands): Promise<void> {
  const dice = new Dice(seed);
  const { isThere } = commands;
  const steps = {
    add: await countSteps(lab, () => commands.add()),
    remove: 0,
  };
  await commands.use();
  steps.remove = await countSteps(lab, () => commands.remove());
  await lab.replaceDaemon();
  await lab.takenUp();
  const before = await openFiles(lab);
  for (const which of ["add", "remove"] as const) {
    const all = Array.from({ length: steps[which] }, (_, index) => index + 1);
    const points = Number.isFinite(POINTS) ? Array.from({ length: POINTS }, () => dice.pick(all)) : all;
    for (const point of points) {
      try {
        if (which === "remove") {
          await commands.add();
          await commands.use();
        }
        await dieIn(lab, () => commands[which](), point);
        const there = await isThere();
        if (which === "add") {
          if (!there) await commands.add();
          await commands.use();
          await commands.remove();
        } else if (there) await commands.remove();
        expect(await isThere()).toBe(false);
        await holdsNoMore(lab, before);
        expect(await lab.call("stats")).toMatchObject({ protected: true });
      } catch (cause) {
        throw new Error(`${which}, step ${point} of ${steps[which]}\n${lab.story}`, { cause });
      }
    }
  }
  console.log(`${name}: ${JSON.stringify(steps)} steps`);
}

const timeout = atLength(3_600_000, 120_000);

test(
  `the daemon dies while a PF comes or goes: it is there or it is not, and both can be said again (seed ${seed})`,
  async () => {
    await using lab = await HaLab.create();
    await lab.startDaemon();
    await dieInEach("PF", lab, {
      isThere: async () => (await lab.call<{ pfs: unknown[] }>("pf.list")).pfs.length > 0,
      add: () => lab.addPf(),
      remove: async () => void (await lab.call("pf.remove", { device: lab.pf })),
      async use() {
        const { pfs } = await lab.call<{ pfs: unknown[] }>("pf.list");
        expect(pfs).toMatchObject([{ managed: true, reason: null }]);
      },
    });
  },
  timeout,
);

test(
  `the daemon dies while a VF comes or goes: it is there or it is not, and the one beside it runs (seed ${seed})`,
  async () => {
    await using lab = await HaLab.create({ queues: 2 });
    await lab.startDaemon();
    await lab.addPf();
    using guest = await SteppedGuest.start(lab);
    using other = await SteppedGuest.start(lab, 1);
    guest.hangUp();
    await lab.removeVf();
    await dieInEach("VF", lab, {
      async isThere() {
        const { vfs, left } = await lab.call<{ vfs: { vf: string }[]; left: unknown[] }>("vf.list");
        expect(left).toEqual([]);
        return vfs.some(({ vf }) => vf === lab.vfAt(0));
      },
      add: () => lab.addVf(),
      remove: () => lab.removeVf(),
      async use() {
        // It may have been added anew, and removed again, meanwhile.
        await guest.meetLiving();
        await guest.progress();
        await other.isHeard();
      },
    });
    await lab.addVf();
    await guest.meetLiving();
    await guest.end();
    await other.end();
    expect(other.reconnects).toBe(0);
  },
  timeout,
);
