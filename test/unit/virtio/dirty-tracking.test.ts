import { describe, expect, test } from "bun:test";
import { duplicate } from "../../../src/native/fd.ts";
import { truncate } from "../../../src/native/sys.ts";
import { TRACKING_MODES, type TrackingModeName } from "../../../src/virtio/admin/vendor.ts";
import { DataPath } from "../../../src/virtio/data-path.ts";
import type { MoverFactory } from "../../../src/virtio/mover.ts";
import { VendorMover } from "../../../src/virtio/movers/vendor.ts";
import type { FakeCommand } from "../../kit/fake-admin.ts";
import { fakeClass } from "../../kit/fake-class.ts";
import { rejection } from "../../kit/rejection.ts";
import { wantedState } from "./states.ts";
import { allPages, FrontEndLog, runningTracked, setUpTracking } from "./tracking-lab.ts";
import { cleanUpAfterEach, soon } from "./vendor-lab.ts";

cleanUpAfterEach();

const names = (commands: readonly FakeCommand[]) => commands.map(({ name }) => name);

describe("the proof", () => {
  test("takes the best mode that works, with a few commands, and leaves nothing", async () => {
    const { mover, pf, vf } = await setUpTracking([...TRACKING_MODES].reverse());
    expect(mover.capabilities.dirtyTracking).toBe(false);
    pf.seen.length = 0;
    await mover.prove(soon());
    expect(mover.capabilities.dirtyTracking).toBe(true);
    expect(names(pf.seen)).toEqual(["startTracking", "stopTracking"]);
    expect(mover.snapshot()).toEqual({ kind: "reset", tracking: "pushBitmap" });
    expect(pf.maps).toBe(0);
    expect(vf.tracking).toBeUndefined();
  });

  test.each(TRACKING_MODES)("of a PF that has %s alone", async (mode) => {
    const { mover, pf } = await setUpTracking([mode]);
    await mover.prove(soon());
    expect(mover.snapshot().tracking).toBe(mode);
    expect(pf.maps).toBe(0);
  });

  test("goes on to the next mode where one is refused, also when it is ended", async () => {
    const { mover, pf } = await setUpTracking(["pushBitmap", "pullBitmap"]);
    pf.answer = (asked) => {
      const refused = asked.name === "stopTracking" && pf.vfs[0]!.tracking?.mode === "pushBitmap";
      if (refused) pf.vfs[0]!.tracking = undefined;
      return refused ? { status: 0x85 } : pf.honest(asked);
    };
    await mover.prove(soon());
    expect(mover.snapshot().tracking).toBe("pullBitmap");
    expect(pf.maps).toBe(0);
  });

  test("says why there is none, and the VF serves all the same", async () => {
    const { mover, pf, notices } = await setUpTracking(["pushBitmap", "pullBytemap"]);
    pf.answer = (asked) => (asked.class === 65 ? { status: 0x82 } : pf.honest(asked));
    await mover.prove(soon());
    expect(mover.capabilities).toEqual({ resumeAnywhere: true, dirtyTracking: false });
    expect(notices).toEqual([expect.stringMatching(/cannot be marked: pushBitmap: .*startTracking.*pullBytemap: /)]);
    const log = new FrontEndLog(64);
    expect(await rejection(mover.track(log.tracking(), soon()))).toMatchObject({ code: "notSupported" });
    await mover.track(undefined, soon());
    await mover.configure(wantedState(1), soon());
    expect(pf.maps).toBe(0);
  });

  test("memory stays mapped for a command that may be done yet", async () => {
    const { mover, pf } = await setUpTracking(["pushBitmap", "pushBytemap"]);
    pf.answer = (asked) => (asked.name === "startTracking" ? "silence" : pf.honest(asked));
    await mover.prove(soon(50));
    expect(mover.capabilities.dirtyTracking).toBe(false);
    expect(pf.maps).toBe(1);
    expect(pf.commands("startTracking").length).toBe(1);
  });

  test("memory stays mapped also for a second try, and for a device that does not end what it has begun", async () => {
    for (const [refused, then] of [
      ["startTracking", "silence"],
      ["stopTracking", { status: 0x85 }],
    ] as const) {
      const { mover, pf } = await setUpTracking(["pushBitmap"]);
      let tries = 0;
      pf.answer = (asked) => {
        if (asked.name !== refused) return pf.honest(asked);
        return tries++ === 0 ? { status: 1 } : then;
      };
      await mover.prove(soon(50));
      expect(tries).toBe(2);
      expect(mover.capabilities.dirtyTracking).toBe(false);
      expect(pf.maps).toBe(1);
    }
  });

  test("is not repeated after a restart, and a record is not believed that names what the PF does not have", async () => {
    const { mover, host, managed } = await setUpTracking(["pullBitmap"]);
    await mover.prove(soon());
    const revived = (tracking: string) => {
      const one = new VendorMover(host, managed, { kind: "reset", tracking });
      const { dirtyTracking } = one.capabilities;
      one.abandon();
      return dirtyTracking;
    };
    expect(revived(mover.snapshot().tracking!)).toBe(true);
    expect(revived("pushBitmap")).toBe(false);
    expect(revived("toString")).toBe(false);
  });
});

test("a data path tries it when it is opened, and knows it after a restart", async () => {
  const { managed, fn, pf } = await setUpTracking(["pushBitmap"]);
  const make: MoverFactory = (host, snapshot) => new VendorMover(host, managed, snapshot);
  const path = await DataPath.open(fn, () => fakeClass(), soon(), make);
  expect(path.capabilities.dirtyTracking).toBe(true);
  const { data, fds } = path.snapshot();
  const own = new Map([...fds].map(([name, fd]) => [name, duplicate(fd)]));
  path.abandon();
  pf.seen.length = 0;
  const revived = DataPath.revive(fn, JSON.parse(JSON.stringify(data)), own, () => fakeClass(), make);
  expect(revived.capabilities.dirtyTracking).toBe(true);
  expect(pf.seen).toEqual([]);
  const log = new FrontEndLog(64);
  await revived.track(log.tracking(), soon());
  revived.abandon();
  expect(pf.maps).toBe(1);
});

describe.each(TRACKING_MODES)("%s", (mode) => {
  test("each page that was written is in the log once the device is frozen", async () => {
    for (const offset of [0, 8192]) {
      const { mover, pf, rings } = await runningTracked([mode]);
      const log = new FrontEndLog(1000, offset);
      await mover.track(log.tracking(997), soon());
      pf.write(1, 0, 3, 517, 996);
      await mover.freeze(rings, "drained", soon());
      expect(log.take()).toEqual([0, 3, 517, 996]);
      await mover.configure(wantedState(1), soon());
      pf.write(1, 5);
      await mover.freeze(rings, "drained", soon());
      expect(log.take()).toEqual([5]);
      await mover.track(undefined, soon());
      expect(pf.maps).toBe(0);
      expect(pf.vfs[0]!.tracking).toBeUndefined();
    }
  });

  test("the device is told of the range, and to stop by where it begins", async () => {
    const { mover, pf } = await runningTracked([mode]);
    const log = new FrontEndLog(64);
    await mover.track({ ...log.tracking(), end: 62 * 4096 + 1 }, soon());
    expect(pf.vfs[0]!.tracking).toMatchObject({ mode, pageSize: 4096, range: { address: 0, length: 63 * 4096 } });
    await mover.track(undefined, soon());
    expect([...pf.commands("stopTracking")[0]!.data]).toEqual([1, ...new Array(15).fill(0)]);
    await mover.track(undefined, soon());
    expect(pf.commands("stopTracking").length).toBe(1);
  });

  test("while it runs, too: into the log within a moment", async () => {
    const { mover, pf } = await runningTracked([mode]);
    const log = new FrontEndLog(640);
    await mover.track(log.tracking(), soon());
    pf.write(1, 7, 600);
    const seen: number[] = [];
    const look = () => {
      seen.push(...log.take());
      return seen.length === 2 || undefined;
    };
    await soon(5000).poll(look, 5);
    expect(seen).toEqual([7, 600]);
  });

  test("another log or end: all is marked in the new one, once", async () => {
    const { mover, pf, rings } = await runningTracked([mode]);
    const [first, second] = [new FrontEndLog(100), new FrontEndLog(200)];
    await mover.track(first.tracking(), soon());
    const { length } = pf.seen;
    await mover.track(first.tracking(), soon());
    expect(pf.seen.length).toBe(length);
    expect(first.take()).toEqual([]);
    await mover.track(second.tracking(150), soon());
    expect(second.take()).toEqual(allPages(150));
    await mover.track(second.tracking(190), soon());
    expect(second.take()).toEqual(allPages(190));
    pf.write(1, 180);
    await mover.freeze(rings, "drained", soon());
    expect(second.take()).toEqual([180]);
    expect(first.take()).toEqual([]);
    expect(pf.maps).toBe(mode.startsWith("push") ? 1 : 0);
  });

  test("a log that is too small is refused with both sizes, and nothing is asked of the device", async () => {
    const { mover, pf } = await runningTracked([mode]);
    const log = new FrontEndLog(64);
    expect(await rejection(mover.track(log.tracking(65), soon()))).toMatchObject({
      code: "invalid",
      message: expect.stringMatching(/has 8 bytes.* needs 9/),
    });
    expect(pf.seen).toEqual([]);
    expect(pf.maps).toBe(0);
  });

  test("a refused start leaves nothing mapped, and the next one works", async () => {
    const { mover, pf } = await runningTracked([mode]);
    const log = new FrontEndLog(64);
    pf.answer = (asked) => (asked.name === "startTracking" ? { status: 0x81 } : pf.honest(asked));
    expect(await rejection(mover.track(log.tracking(), soon()))).toMatchObject({
      code: "io",
      message: expect.stringMatching(/refused startTracking of virtfn0/),
    });
    expect(pf.maps).toBe(0);
    pf.answer = (asked) => pf.honest(asked);
    await mover.track(log.tracking(), soon());
    expect(pf.vfs[0]!.tracking?.mode).toBe(mode);
  });

  test("where it cannot be asked for the rest, all counts as written", async () => {
    const { mover, pf, rings } = await runningTracked([mode]);
    const log = new FrontEndLog(100);
    let lost = 0;
    mover.onTrackingLost(() => lost++);
    await mover.track(log.tracking(), soon());
    pf.answer = (asked) => (asked.class === 65 ? { status: 0x85 } : pf.honest(asked));
    await soon(5000).poll(() => lost > 0 || undefined, 5);
    await mover.freeze(rings, "drained", soon());
    expect(log.take()).toEqual(allPages(100));
    expect(lost).toBe(1);
  });

  test("a device that forgets it with a reset is told anew", async () => {
    const { mover, pf, vf, rings } = await runningTracked([mode]);
    const log = new FrontEndLog(100);
    await mover.track(log.tracking(), soon());
    pf.write(1, 11);
    await mover.reset(soon());
    expect(log.take()).toEqual([11]);
    await mover.configure(wantedState(1), soon());
    expect(log.take()).toEqual([]);
    await mover.reset(soon());
    vf.tracking = undefined;
    await mover.configure(wantedState(1), soon());
    expect(log.take()).toEqual(allPages(100));
    await mover.reset(soon());
    expect(log.take()).toEqual([]);
    await mover.configure(wantedState(1), soon());
    pf.write(1, 9);
    await mover.freeze(rings, "drained", soon());
    expect(log.take()).toEqual([9]);
  });

  test("what an earlier process began is ended first, and all counts as written", async () => {
    const { mover, pf, host, managed } = await runningTracked([mode]);
    const [old, log] = [new FrontEndLog(64), new FrontEndLog(100)];
    await mover.track(old.tracking(), soon());
    const revived = new VendorMover(host, managed, mover.snapshot());
    mover.abandon();
    await revived.track(log.tracking(), soon());
    const told = names(pf.seen).filter((name) => name === "startTracking" || name === "stopTracking");
    expect(told).toEqual(["startTracking", "stopTracking", "startTracking"]);
    expect(log.take()).toEqual(allPages(100));
    await revived.track(undefined, soon());
    revived.abandon();
  });
});

test("a device is not believed that reports pages behind the last one", async () => {
  for (const mode of ["pullBitmap", "pullBytemap"] as const) {
    const { mover, pf, rings } = await runningTracked([mode]);
    const log = new FrontEndLog(64);
    await mover.track(log.tracking(61), soon());
    pf.answer = (asked) =>
      asked.name === "reportMap" ? { status: 0, result: new Uint8Array(asked.room).fill(0xff) } : pf.honest(asked);
    await mover.freeze(rings, "drained", soon());
    expect(log.take()).toEqual(allPages(61));
  }
});

describe("a loss", () => {
  const track = async (mode: TrackingModeName = "pushBitmap") => {
    const parts = await runningTracked([mode]);
    const log = new FrontEndLog(64);
    const errors: string[] = [];
    parts.mover.onTrackingLost((error) => errors.push(error.message));
    await parts.mover.track(log.tracking(), soon());
    const lost = () => soon(5000).poll(() => errors.length > 0 || undefined, 5);
    return { ...parts, log, errors, lost };
  };

  test("is told once for each time that it was begun", async () => {
    const { mover, pf, log, errors, lost } = await track();
    pf.vfs[0]!.tracking = undefined;
    await lost();
    expect(errors).toEqual([expect.stringMatching(/refused pendingMap/)]);
    await Bun.sleep(0);
    expect(errors.length).toBe(1);
    errors.length = 0;
    pf.answer = (asked) => (asked.name === "stopTracking" ? { status: 0 } : pf.honest(asked));
    await mover.track(log.tracking(), soon());
    expect(log.take()).toEqual(allPages(64));
    pf.vfs[0]!.tracking = undefined;
    await lost();
  });

  test("with the admin queue, at once; the VF stops by its registers, and all counts as written", async () => {
    const { mover, pf, log, rings, errors, admin } = await track();
    let known: number | undefined;
    admin.queue.onDead(() => {
      known = errors.length;
    });
    pf.complete(0xffff);
    await soon().poll(() => known, 1);
    expect(known).toBe(1);
    expect(errors[0]).toMatch(/is dead/);
    rings.set(0, { available: 0, used: 0 });
    await mover.freeze(rings, "drained", soon());
    expect(log.take()).toEqual(allPages(64));
  });

  test("of the front-end's log itself harms nobody", async () => {
    for (const mode of TRACKING_MODES) {
      const { mover, pf, log, rings, notices } = await track(mode);
      truncate(log.file.number, 0);
      if (mode !== "pushBitmap") pf.write(1, 3);
      pf.answer = (asked) => (asked.name === "reportMap" ? { status: 0x85 } : pf.honest(asked));
      await mover.freeze(rings, "drained", soon());
      expect(notices.length).toBe(mode === "pushBitmap" ? 0 : 1);
      await mover.track(undefined, soon());
      expect(pf.maps).toBe(0);
    }
  });
});

describe("memory of the PF", () => {
  test("one mapping serves all VFs with the same log, until the last has stopped", async () => {
    const { movers, pf, rings } = await runningTracked(["pushBitmap"], 3);
    const [log, other] = [new FrontEndLog(256), new FrontEndLog(256)];
    await Promise.all(movers.slice(0, 2).map(({ mover }) => mover.track(log.tracking(), soon())));
    expect(pf.maps).toBe(1);
    await movers[2]!.mover.track(other.tracking(), soon());
    expect(pf.maps).toBe(2);
    pf.write(1, 1, 8);
    pf.write(2, 2, 9);
    pf.write(3, 3);
    for (const { mover } of movers) await mover.freeze(rings, "drained", soon());
    expect(log.take()).toEqual([1, 2, 8, 9]);
    expect(other.take()).toEqual([3]);
    await movers[0]!.mover.track(undefined, soon());
    pf.write(2, 4);
    expect(log.take()).toEqual([4]);
    await movers[1]!.mover.track(undefined, soon());
    expect(pf.maps).toBe(1);
    await movers[2]!.mover.track(undefined, soon());
    expect(pf.maps).toBe(0);
    expect(pf.domain.owners.length).toBe(1);
  });

  test.each(["pushBitmap", "pushBytemap"] as const)(
    "stays for a device that does not stop, until it is at rest: %s",
    async (mode) => {
      for (const ends of ["frozen", "reset", "at rest before"] as const) {
        const { mover, pf, rings } = await runningTracked([mode]);
        const log = new FrontEndLog(64);
        await mover.track(log.tracking(), soon());
        pf.answer = (asked) => (asked.name === "stopTracking" ? { status: 0x81 } : pf.honest(asked));
        if (ends === "frozen") await mover.freeze(rings, "drained", soon());
        if (ends === "at rest before") await mover.reset(soon());
        expect(await rejection(mover.track(undefined, soon()))).toMatchObject({ code: "io" });
        expect(pf.maps).toBe(ends === "at rest before" ? 0 : 1);
        await mover.reset(soon());
        expect(pf.maps).toBe(0);
      }
    },
  );

  test("stays for a stop that was never answered, until it is", async () => {
    const { mover, pf } = await runningTracked(["pushBitmap"]);
    const log = new FrontEndLog(64);
    await mover.track(log.tracking(), soon());
    pf.answer = (asked) => (asked.name === "stopTracking" ? "silence" : pf.honest(asked));
    expect((await rejection(mover.track(undefined, soon(50)))).message).toMatch(/did not answer stopTracking/);
    expect(mover.capabilities.dirtyTracking).toBe(false);
    await mover.reset(soon());
    expect(pf.maps).toBe(1);
    pf.answer = (asked) => pf.honest(asked);
    pf.complete(pf.commands("stopTracking")[0]!.head);
    await soon().poll(() => mover.capabilities.dirtyTracking || undefined, 1);
    await mover.reset(soon());
    expect(pf.maps).toBe(0);
  });

  test("a stop that was refused is tried again when it is asked for again", async () => {
    const { mover, pf } = await runningTracked(["pushBytemap"]);
    const log = new FrontEndLog(64);
    await mover.track(log.tracking(), soon());
    pf.answer = (asked) => (asked.name === "stopTracking" ? { status: 0x81 } : pf.honest(asked));
    await rejection(mover.track(undefined, soon()));
    pf.answer = (asked) => pf.honest(asked);
    await mover.track(undefined, soon());
    expect(pf.maps).toBe(0);
  });

  test("a log that is no longer in its file is refused", async () => {
    const { mover, pf } = await runningTracked(["pushBitmap"]);
    const log = new FrontEndLog(64);
    const wanted = log.tracking();
    truncate(log.file.number, 4);
    expect(await rejection(mover.track(wanted, soon()))).toMatchObject({ code: "invalid" });
    expect(pf.maps).toBe(0);
  });
});

test("memory that ends so far away that its map would be huge is refused, and nothing is mapped", async () => {
  for (const [mode, most] of [
    ["pushBitmap", 2 ** 32],
    ["pushBytemap", 2 ** 29],
  ] as const) {
    const { mover, pf } = await runningTracked([mode]);
    const log = new FrontEndLog(most + 1);
    const refusal = await rejection(mover.track(log.tracking(), soon()));
    expect(refusal).toMatchObject({ code: "invalid", message: expect.stringContaining("at most 536870912") });
    expect(pf.commands("startTracking")).toEqual([]);
    expect(pf.maps).toBe(0);
  }
});
