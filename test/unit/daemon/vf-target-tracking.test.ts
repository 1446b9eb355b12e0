import { describe, expect, test } from "bun:test";
import { VhostdError } from "../../../src/base/errors.ts";
import { rejection } from "../../kit/rejection.ts";
import { wantedState } from "../virtio/states.ts";
import { FrontEndLog } from "../virtio/tracking-lab.ts";
import { cleanUpAfterEach, soon } from "../virtio/vendor-lab.ts";
import { makeTarget } from "./target-lab.ts";

cleanUpAfterEach();

test("the end of a session ends the marking, also where the function does not come to rest", async () => {
  for (const restless of [false, true]) {
    const { target, pf, fn, rings } = await makeTarget();
    expect(target.dirtyTracking).toBe(true);
    const log = new FrontEndLog(64);
    await target.start(wantedState(1), new Map());
    await target.track(log.tracking());
    pf.write(1, 3);
    expect(log.take()).toEqual([3]);
    await target.stop(rings, "drained");
    await target.start(wantedState(1), new Map());
    expect(pf.maps).toBe(1);
    fn.faults.resetNeverEnds = restless;
    if (restless) pf.answer = (asked) => (asked.name === "modifyStatus" ? { status: 0x85 } : pf.honest(asked));
    const ended = target.release(rings);
    if (restless) expect(await rejection(ended)).toMatchObject({ code: "resetTimedOut" });
    else await ended;
    expect(pf.maps).toBe(0);
    expect(pf.vfs[0]!.tracking).toBeUndefined();
  }
});

test("the session of a function that has failed is told that not all that it wrote was marked", async () => {
  for (const marks of [false, true]) {
    const { target, rings, fail } = await makeTarget(["pullBitmap"]);
    const log = new FrontEndLog(64);
    await target.start(wantedState(1), new Map());
    if (marks) await target.track(log.tracking());
    fail(new Error("it is gone"));
    const ended = target.release(rings);
    if (marks) expect((await rejection(ended)).message).toBe("it has failed: it is gone");
    else await ended;
    // The next one has asked for nothing.
    await target.release(rings);
  }
});

test("a session is told that marking is lost, and that it is not offered while the PF cannot be asked", async () => {
  const { target, pf } = await makeTarget();
  const lost: string[] = [];
  target.onTrackingLost((error) => lost.push(error instanceof VhostdError ? error.code : String(error)));
  const log = new FrontEndLog(64);
  await target.track(log.tracking());
  pf.complete(0xffff);
  await soon().poll(() => lost.length > 0 || undefined, 1);
  expect(lost).toEqual(["adminQueue"]);
  expect(target.dirtyTracking).toBe(false);
});

test("what was prepared is begun with by few commands", async () => {
  const { target, pf } = await makeTarget();
  await target.prepare(wantedState(1, 7));
  pf.seen.length = 0;
  await target.start(wantedState(1, 7), new Map());
  expect(pf.seen.map(({ name }) => name)).toEqual(["modifyStatus", "modifyStatus"]);
});

test("what was prepared and is not there any more is given anew", async () => {
  for (const byHand of [false, true]) {
    const { target, host, fn, vf, dataPath } = await makeTarget();
    await target.prepare(wantedState(1, 7));
    if (byHand) await dataPath.manual!.change("quiesced", soon());
    else await host.device.reset(soon());
    await target.start(wantedState(1, 7), new Map());
    expect(fn.status).toBe(0x0f);
    expect(vf.restored.map(({ indices }) => indices[0]?.lastAvail)).toEqual(byHand ? [7, 7] : [7]);
  }
});

test("what is known of a migration: at the source, cancelled, and handed over", async () => {
  const { target, events, rings } = await makeTarget();
  const log = new FrontEndLog(64);
  const state = wantedState(1);
  await target.start(state, new Map());
  await target.stop(rings, "drained");
  await target.start(state, new Map());
  expect(target.migration.info).toBeNull();
  await target.track(log.tracking());
  await target.stop(rings, "listed");
  await target.start(state, new Map());
  expect(events).toEqual(["tracking"]);
  await target.stop(rings, "drained");
  const times = target.migration.info!.phases;
  expect(Object.keys(times).sort()).toEqual(["begin_tracking", "freeze", "kicks_off", "stop", "tracking"]);
  for (const part of [times.kicks_off, times.freeze]) expect(part).toBeLessThanOrEqual(times.stop!);
  await target.start(state, new Map());
  await target.track(undefined);
  await target.track(log.tracking());
  await target.stop(rings, "drained");
  await target.release(rings);
  expect(events).toEqual(["tracking", "handed-over", "tracking", undefined, "tracking", "handed-over"]);
  expect(target.migration.info).toMatchObject({ state: "handed-over", dirty: null });
});

test("what is known of a migration: at the destination, early or not", async () => {
  for (const early of [false, true]) {
    const { target, events, rings } = await makeTarget();
    rings.set(0, { available: 7, used: 7 });
    if (early) await target.prepare(wantedState(1, 0));
    await target.start(wantedState(1, 7), new Map());
    expect(events).toEqual(early ? ["prepared", "arrived"] : ["arrived"]);
    expect(Object.keys(target.migration.info!.phases).sort()).toEqual(early ? ["prepare", "start"] : ["start"]);
    await target.release(rings);
    // The same process comes back to its rings.
    await target.start(wantedState(1, 7), new Map());
    expect(target.migration.info).toBeNull();
  }
});

describe("a log by hand", () => {
  const forms = [
    [["pushBitmap", "pushBytemap"], undefined, "push-bitmap"],
    [["pushBitmap", "pushBytemap"], "bytemap", "push-bytemap"],
    [["pullBytemap", "pullBitmap"], "bitmap", "pull-bitmap"],
    [["pullBytemap"], "bitmap", "pull-bytemap"],
  ] as const;
  for (const [modes, form, mode] of forms) {
    test(`counts what was written: ${modes.join(", ")}, ${form ?? "any form"}`, async () => {
      const { target, pf } = await makeTarget(modes);
      await target.start(wantedState(1), new Map());
      expect(await target.byHand.start(form)).toEqual({ mode });
      pf.write(1, 3, 4, 99);
      expect(await target.byHand.stop()).toMatchObject({ mode, pages: 3, milliseconds: expect.any(Number) });
      expect(pf.vfs[0]!.tracking).toBeUndefined();
      expect(pf.maps).toBe(0);
      expect(target.migration.info).toBeNull();
      expect(await rejection(target.byHand.stop())).toMatchObject({ code: "invalid" });
    });
  }

  test("is refused where no guest runs, while the front-end logs, twice, and where nobody can", async () => {
    const { target, pf } = await makeTarget();
    expect(await rejection(target.byHand.start(undefined))).toMatchObject({ code: "busy" });
    await target.start(wantedState(1), new Map());
    const log = new FrontEndLog(64);
    await target.track(log.tracking());
    expect(await rejection(target.byHand.start(undefined))).toMatchObject({ code: "busy" });
    pf.write(1, 3);
    expect(log.take()).toEqual([3]);
    await target.track(undefined);
    await target.byHand.start(undefined);
    expect(await rejection(target.byHand.start(undefined))).toMatchObject({ code: "busy" });
    await target.byHand.stop();
    const { target: other } = await makeTarget([]);
    await other.start(wantedState(1), new Map());
    expect(await rejection(other.byHand.start(undefined))).toMatchObject({ code: "notSupported" });
  });

  test("gives way to the front-end, whose log is complete, and ends with its session", async () => {
    const { target, pf, rings } = await makeTarget();
    await target.start(wantedState(1), new Map());
    await target.byHand.start(undefined);
    const log = new FrontEndLog(64);
    await target.track(log.tracking());
    pf.write(1, 5);
    expect(log.take()).toEqual([5]);
    expect(await rejection(target.byHand.stop())).toMatchObject({
      code: "invalid",
      message: expect.stringContaining("front-end logs"),
    });
    pf.write(1, 6);
    expect(log.take()).toEqual([6]);
    await target.track(undefined);
    await target.byHand.start(undefined);
    await target.release(rings);
    expect(pf.vfs[0]!.tracking).toBeUndefined();
    expect(await rejection(target.byHand.stop())).toMatchObject({ message: expect.stringContaining("session") });
  });

  test("that is lost is none of the session's business", async () => {
    const { target, pf } = await makeTarget();
    const lost: Error[] = [];
    target.onTrackingLost((error) => lost.push(error));
    await target.start(wantedState(1), new Map());
    await target.byHand.start(undefined);
    pf.complete(0xffff);
    await soon().poll(() => !target.byHand.isOn || undefined, 1);
    expect(lost).toEqual([]);
    expect(await rejection(target.byHand.stop())).toMatchObject({ code: "invalid" });
  });
});
