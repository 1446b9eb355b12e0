import { describe, expect, test } from "bun:test";
import { writeFile } from "node:fs/promises";
import { join } from "node:path";
import { Deadline } from "../../src/base/deadline.ts";
import { HaLab, type HaLabOptions } from "../kit/ha-lab.ts";
import { SteppedGuest } from "../kit/ha-steps.ts";
import { rejection } from "../kit/rejection.ts";

/** The keeper is absent, dies, hangs or refuses; the daemon ends in every way. */

const ANY_TIME = 20_000;

/** Fds of records that a keeper with few open files has room for: those of a PF and of the memory of a VF, not of a VF. */
const ROOM = 12;

/** Open files that it keeps for other things. */
const NOT_FOR_RECORDS = 4096 + 1536;

/** Does it with a daemon that has a PF. @throws Error with what the daemons wrote */
async function withLab(options: HaLabOptions, work: (lab: HaLab) => Promise<void>): Promise<void> {
  await using lab = await HaLab.create({ queues: 2, ...options });
  await lab.startDaemon();
  try {
    await lab.addPf();
    await work(lab);
  } catch (cause) {
    throw new Error(lab.story, { cause });
  }
}

/** A kill of the daemon is not noticed. */
async function survivesKill(lab: HaLab, guest: SteppedGuest): Promise<void> {
  await lab.replaceDaemon();
  await lab.takenUp();
  await guest.isHeard();
}

async function stopDaemon(lab: HaLab): Promise<void> {
  lab.daemon.signal("SIGTERM");
  expect(await Deadline.after(60_000, "end of the daemon").race(lab.daemon.exited)).toBe(0);
}

describe("the keeper", () => {
  test(
    "comes after the daemon: all is written, then it protects",
    () =>
      withLab({ keeper: false }, async (lab) => {
        using guest = await SteppedGuest.start(lab);
        expect(await lab.call("stats")).toMatchObject({ protected: false });
        await lab.startKeeper();
        await lab.isProtected();
        await survivesKill(lab, guest);
        await guest.end();
        expect(guest.reconnects).toBe(0);
      }),
    60_000,
  );

  test(
    "is killed under load: nothing happens; is back: a kill of the daemon is survived",
    () =>
      withLab({}, async (lab) => {
        using guest = await SteppedGuest.start(lab);
        for (let round = 0; round < 3; round++) {
          await lab.keeper.kill();
          await guest.isHeard();
          // Messages that change the record, while nobody keeps it.
          await guest.plug();
          await guest.unplug();
          await guest.stop("new");
          await lab.startKeeper();
          await guest.start();
          await lab.isProtected();
          await survivesKill(lab, guest);
        }
        await guest.end();
        expect(guest.reconnects).toBe(0);
      }),
    60_000,
  );

  test(
    "hangs: messages wait for a bounded time and go on without it; what it has then is not used any more",
    () =>
      withLab({}, async (lab) => {
        using guest = await SteppedGuest.start(lab);
        lab.keeper.signal("SIGSTOP");
        await guest.plug();
        await lab.daemon.line(/the keeper has gone/, ANY_TIME);
        expect(await lab.call("stats")).toMatchObject({ protected: false });
        await guest.isHeard();
        await guest.unplug();
        await lab.daemon.kill();
        lab.keeper.signal("SIGCONT");
        await lab.startDaemon();
        await lab.daemon.line(/\d records of the past, which were dropped/, ANY_TIME);
        expect(await lab.call("vf.list")).toEqual({ vfs: [], left: [] });
        await lab.addPf();
        await lab.addVf();
        await guest.meetNext();
        await guest.end();
        expect(await lab.call("stats")).toMatchObject({ vfs: 1, sessions: 1, protected: true });
      }),
    60_000,
  );

  test(
    "hangs while the next daemon starts: that one says so and ends; the one after it goes on with all",
    () =>
      withLab({}, async (lab) => {
        using guest = await SteppedGuest.start(lab);
        lab.keeper.signal("SIGSTOP");
        await lab.replaceDaemon();
        expect(await Deadline.after(ANY_TIME, "end of the daemon").race(lab.daemon.exited)).toBe(1);
        expect(lab.daemon.log).toContain("keeper.sock");
        lab.keeper.signal("SIGCONT");
        await lab.startDaemon();
        await lab.takenUp();
        await guest.isHeard();
        await guest.end();
        expect(guest.reconnects).toBe(0);
      }),
    60_000,
  );

  test(
    "has no room for a record: that VF is not protected, which is an error in the log, and all goes on",
    () =>
      withLab({ keeper: false }, async (lab) => {
        await lab.startKeeper({ files: NOT_FOR_RECORDS + ROOM });
        await lab.isProtected();
        using guest = await SteppedGuest.start(lab);
        await lab.daemon.line(/error ha: vf\/.* is not kept: a restart of this daemon will be seen/, ANY_TIME);
        expect(await lab.call("stats")).toMatchObject({ protected: false });
        await guest.isHeard();
        // What is kept of it is nothing, not what was there before.
        await lab.dieAndRevive(async (keeper) => expect(await keeper.list()).not.toContain(`vf/${lab.vfAt(0)}`));
        await lab.addVf();
        await guest.meetNext();
        await guest.end();
      }),
    60_000,
  );

  test(
    "serves one daemon: a second one is refused",
    () =>
      withLab({}, async (lab) => {
        const { keeper } = lab;
        const error = await rejection(lab.connectKeeper(2_000));
        expect(error).toMatchObject({ code: "busy", message: `process ${lab.daemon.pid} is connected to the keeper` });
        expect(keeper.running).toBe(true);
        await lab.isProtected();
      }),
    60_000,
  );

  test("is of another user: the daemon does not start, and says why", async () => {
    await using lab = await HaLab.create({ keeper: false });
    await lab.startKeeper({ user: 65_534 });
    // As root it would be served; as anybody else it is not.
    lab.spawnDaemon({ user: 65_533 });
    expect(await Deadline.after(ANY_TIME, "end of the daemon").race(lab.daemon.exited)).toBe(1);
    expect(lab.daemon.log).toMatch(/error the keeper at .* does not serve this daemon: .*of root or of its own user/);
  }, 60_000);
});

describe("both are killed", () => {
  test.each(["daemon", "keeper"] as const)(
    "the %s first: what is configured is added, VMMs connect anew",
    (first) =>
      withLab({}, async (lab) => {
        const config = join(lab.directory, "daemon.toml");
        const vf = `[[vf]]\ndevice = "${lab.vfAt(0)}"\nsocket = "${lab.socket("vf0.sock")}"\n`;
        await writeFile(config, `[[pf]]\ndevice = "${lab.pf}"\n\n${vf}`);
        using guest = await SteppedGuest.start(lab);
        const dead = first === "daemon" ? [lab.daemon, lab.keeper] : [lab.keeper, lab.daemon];
        for (const one of dead) await one.kill();
        await lab.startKeeper();
        await lab.startDaemon({ arguments: ["--config", config] });
        await guest.meetNext();
        await guest.progress();
        // Those of the configuration are not added twice.
        await lab.isProtected();
        await lab.replaceDaemon({ arguments: ["--config", config] });
        await lab.takenUp();
        await guest.isHeard();
        await guest.end();
        expect(guest.reconnects).toBe(1);
        expect(lab.daemon.log).not.toMatch(/ (warn|error) /);
      }),
    60_000,
  );
});

describe("the daemon is asked to end", () => {
  test(
    "with a keeper: VFs run on with nobody there, and the next daemon goes on",
    () =>
      withLab({}, async (lab) => {
        using guest = await SteppedGuest.start(lab);
        await stopDaemon(lab);
        await guest.progress();
        await lab.startDaemon();
        await lab.takenUp();
        await guest.isHeard();
        await guest.end();
        expect(guest.reconnects).toBe(0);
      }),
    60_000,
  );

  test(
    "directly after the keeper was restarted: it waits for it",
    () =>
      withLab({}, async (lab) => {
        using guest = await SteppedGuest.start(lab);
        await lab.keeper.kill();
        await lab.daemon.line(/the keeper has gone/, ANY_TIME);
        await lab.startKeeper();
        await stopDaemon(lab);
        await guest.progress();
        await lab.startDaemon();
        await lab.takenUp();
        await guest.isHeard();
        await guest.end();
        expect(guest.reconnects).toBe(0);
      }),
    60_000,
  );

  test(
    "without a keeper: VFs are let go of, in order",
    () =>
      withLab({ keeper: false }, async (lab) => {
        using guest = await SteppedGuest.start(lab);
        // What a device has taken it gives back, and nobody answers it afterwards.
        await guest.rest();
        await stopDaemon(lab);
        await guest.frontend.hungUp();
        expect(lab.daemon.log).not.toMatch(/ (warn|error) /);
        await lab.startDaemon();
        await lab.addPf();
        await lab.addVf();
        await guest.meetNext();
        await guest.move();
        await guest.end();
      }),
    60_000,
  );
});
