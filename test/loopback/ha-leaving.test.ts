import { expect, test } from "bun:test";
import { Deadline } from "../../src/base/deadline.ts";
import { HaLab } from "../kit/ha-lab.ts";
import { SteppedGuest } from "../kit/ha-steps.ts";

/** Milliseconds. */
const ANY_TIME = 20_000;
/** Open files that the keeper has for other things than records. */
const NOT_FOR_RECORDS = 4096 + 1536;
/** Fds of records that it has room for: of a PF and a VF that runs, and of the memory of another VF, but not of that one. */
const ROOM = 32;

test("a daemon that ends hands over what is kept; a VF that the keeper had no room for ends in order", async () => {
  await using lab = await HaLab.create({ queues: 2, keeper: false });
  await lab.startDaemon();
  await lab.addPf();
  await lab.startKeeper({ files: NOT_FOR_RECORDS + ROOM });
  await lab.isProtected();
  try {
    using kept = await SteppedGuest.start(lab);
    expect(await lab.call("stats")).toMatchObject({ protected: true });
    using other = await SteppedGuest.start(lab, 1);
    await lab.daemon.line(new RegExp(`error ha: vf/${lab.vfAt(1)} is not kept`), ANY_TIME);
    expect(await lab.call("stats")).toMatchObject({ protected: false });
    // What its device has taken it gives back, and nobody answers it afterwards.
    await other.rest();
    lab.daemon.signal("SIGTERM");
    expect(await Deadline.after(60_000, "end of the daemon").race(lab.daemon.exited)).toBe(0);
    await other.frontend.hungUp();
    await kept.progress();
    await lab.startDaemon();
    await lab.takenUp();
    await kept.isHeard();
    await kept.end();
    expect(kept.reconnects).toBe(0);
    expect(await lab.call("vf.list")).toMatchObject({ vfs: [{ vf: lab.vfAt(0) }], left: [] });
    expect(await lab.call("stats")).toMatchObject({ vfs: 1, sessions: 1, protected: true });
  } catch (cause) {
    throw new Error(lab.story, { cause });
  }
}, 90_000);
