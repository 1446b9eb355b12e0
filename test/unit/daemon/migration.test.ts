import { describe, expect, test } from "bun:test";
import { silentLogger } from "../../../src/base/log.ts";
import { DirtyRate } from "../../../src/daemon/dirty-rate.ts";
import { Migration, migrationEvent } from "../../../src/daemon/migration.ts";
import { pwrite } from "../../../src/native/sys.ts";
import { parsePciAddress } from "../../../src/pci/address.ts";
import { SEED } from "../../kit/fuzz.ts";
import { rejection } from "../../kit/rejection.ts";
import { wantedState } from "../virtio/states.ts";
import { FrontEndLog } from "../virtio/tracking-lab.ts";
import { cleanUpAfterEach, disposeLater } from "../virtio/vendor-lab.ts";

cleanUpAfterEach();

const VM = 7;
const OTHER_VM = 8;
const done = async () => {};

/** A clock that the work of an operation moves on. */
function make() {
  let time = 0;
  const events: string[] = [];
  const migration: Migration = new Migration(
    silentLogger,
    () => events.push(migration.info?.state ?? "none"),
    () => time,
  );
  disposeLater({ [Symbol.asyncDispose]: async () => migration.abandon() });
  const takes = (milliseconds: number) => async () => {
    time += milliseconds;
  };
  return { migration, events, takes, log: new FrontEndLog(64) };
}

test("the phases at a source have their times", async () => {
  const { migration, takes, log } = make();
  await migration.start(wantedState(1), VM, takes(100));
  await migration.track(log.tracking(), takes(2.25));
  await takes(1000)();
  expect(migration.info).toMatchObject({ state: "tracking", phases: { begin_tracking: 2.25, tracking: 1000 } });
  await migration.stop(async (note) => {
    await takes(0.5)();
    note("kicks_off");
    await takes(4)();
    note("freeze");
    await takes(0.125)();
  });
  await takes(50)();
  const phases = { begin_tracking: 2.25, tracking: 1000, kicks_off: 0.5, freeze: 4.5, stop: 4.625 };
  expect(migration.info).toMatchObject({ state: "handed-over", phases });
  migration.ended();
  expect(migration.info).toMatchObject({ state: "handed-over", phases });
  const vf = parsePciAddress("0000:5a:00.1");
  expect(migrationEvent(vf, migration.info)).toMatchObject({ type: "migration", vf, state: "handed-over", phases });
  await migration.start(wantedState(1), OTHER_VM, done);
  expect(migration.info).toBeNull();
  expect(migrationEvent(vf, null)).toEqual({ type: "migration", vf, state: "none" });
});

test("a VF that takes the place of another knows what that one has handed over", async () => {
  const { migration, log } = make();
  await migration.start(wantedState(1), VM, done);
  await migration.track(log.tracking(), done);
  await migration.stop(async () => {});
  migration.ended();
  const next = make().migration;
  next.follows(migration);
  expect(next.info).toEqual(migration.info);
  await next.start(wantedState(1, 5), VM, done);
  expect(next.info).toMatchObject({ state: "arrived" });
});

test("a stop that fails, and one in which marking is lost, hand nothing over", async () => {
  const { migration, log, events } = make();
  await migration.start(wantedState(1), VM, done);
  await migration.track(log.tracking(), done);
  expect(await rejection(migration.stop(() => Promise.reject(new Error("not drained"))))).toMatchObject({
    message: "not drained",
  });
  expect(migration.info).toMatchObject({ state: "tracking" });
  await migration.stop(async () => migration.lost());
  expect(events).toEqual(["tracking", "lost"]);
  expect(migration.isMarking).toBe(false);
  migration.ended();
  await migration.track(log.tracking(), done);
  await rejection(migration.track(log.tracking(), () => Promise.reject(new Error("refused"))));
  expect(migration.info).toMatchObject({ state: "lost" });
});

test("what could not be begun was not begun", async () => {
  const { migration, log, events } = make();
  const refused = () => Promise.reject(new Error("refused"));
  for (const begin of [
    () => migration.track(log.tracking(), refused),
    () => migration.prepare(refused),
    () => migration.start(wantedState(1, 5), VM, refused),
  ]) {
    await rejection(begin());
    expect(migration.info).toBeNull();
  }
  expect(events).toEqual([]);
});

describe("a start in the middle of the rings", () => {
  test("is an arrival for another process than the last, or after a hand-over", async () => {
    const { migration, takes, log } = make();
    await migration.start(wantedState(1), VM, done);
    migration.ended();
    await migration.start(wantedState(1, 5), VM, done);
    expect(migration.info).toBeNull();
    migration.ended();
    await migration.start(wantedState(1, 5), OTHER_VM, takes(3));
    expect(migration.info).toMatchObject({ state: "arrived", phases: { start: 3 } });
    await migration.start(wantedState(1, 9), OTHER_VM, takes(5));
    expect(migration.info).toMatchObject({ state: "arrived", phases: { start: 3 } });
    await migration.track(log.tracking(), done);
    await migration.stop(async () => {});
    migration.ended();
    await migration.start(wantedState(1, 12), OTHER_VM, done);
    expect(migration.info).toMatchObject({ state: "arrived" });
  });

  test("is none where an earlier process of the daemon served the same front-end", async () => {
    const { migration } = make();
    migration.joined(VM);
    await migration.start(wantedState(1, 5), VM, done);
    expect(migration.info).toBeNull();
  });
});

test("what was prepared is gone with a reset, and with the front-end", async () => {
  const { migration, takes, events } = make();
  await migration.prepare(takes(40));
  expect(migration.info).toMatchObject({ state: "prepared", phases: { prepare: 40 } });
  migration.wasReset();
  await migration.prepare(done);
  migration.ended();
  await migration.prepare(takes(40));
  await migration.start(wantedState(1), VM, takes(1));
  expect(migration.info).toMatchObject({ state: "arrived", phases: { prepare: 40, start: 1 } });
  expect(events).toEqual(["prepared", "none", "prepared", "none", "prepared", "arrived"]);
});

test(`no order of what a front-end does is impossible (seed ${SEED})`, async () => {
  const { migration, log } = make();
  let seed = SEED;
  const random = () => {
    seed = (Math.imul(seed, 1103515245) + 12345) >>> 0;
    return seed / 2 ** 32;
  };
  const steps = [
    () => migration.track(log.tracking(), done),
    () => migration.track(undefined, done),
    () => migration.stop(async () => {}),
    () => migration.stop(async () => migration.lost()),
    () => migration.start(wantedState(1, random() < 0.5 ? 0 : 5), random() < 0.5 ? VM : OTHER_VM, done),
    () => migration.prepare(done),
    async () => migration.lost(),
    async () => migration.wasReset(),
    async () => migration.ended(),
  ];
  for (let step = 0; step < 20_000; step++) await steps[Math.floor(random() * steps.length)]!();
});

test("pages that are marked, and how fast they become more", async () => {
  const log = new FrontEndLog(128);
  const write = (...bytes: number[]) => pwrite(log.file.number, Uint8Array.from(bytes), 0);
  let time = 0;
  using rate = new DirtyRate(log.tracking().log, () => time);
  expect(rate.found).toBeNull();
  write(0xff, 0x01);
  await rate.look();
  expect(rate.found).toEqual({ pages: 9, pages_per_second: 0 });
  time += 2000;
  write(0xff, 0xff, 0xff);
  await rate.look();
  expect(rate.found).toEqual({ pages: 24, pages_per_second: 8 });
  // Cleared by the front-end.
  time += 2000;
  write(0x0f, 0, 0);
  await rate.look();
  expect(rate.found).toEqual({ pages: 4, pages_per_second: 2 });
});
