import { afterEach, beforeEach, describe, expect, test } from "bun:test";
import { Deadline } from "../../src/base/deadline.ts";
import {
  TRACKING_FEATURE,
  TRACKING_IDENTITY_RESULT,
  TrackingMode,
  type TrackingModeName,
} from "../../src/virtio/admin/vendor.ts";
import { hasFeature } from "../../src/virtio/features.ts";
import { DescriptorFlag } from "../../src/virtio/split-ring.ts";
import { BlkType, header as blkHeader } from "../kit/blk-requests.ts";
import { encodeFrame } from "../kit/net/frames.ts";
import { header, RawAdmin } from "./softvf-admin.ts";
import { GUEST_BASE, TestDriver, TestVfs } from "./softvf-driver.ts";
import { MovedGuest } from "./softvf-guest.ts";
import { NetDriver, serveNet } from "./softvf-net.ts";
import { PAGE, PushMap, startData, Tracked, trackedRange, Witness } from "./softvf-tracking.ts";

const ERROR = 0x81;
const CLASS = 0x82;
const COMMAND = 0x83;
const DATA = 0x84;
const INTERNAL = 0x85;

const MODES = Object.keys(TrackingMode) as TrackingModeName[];
const { write: W } = DescriptorFlag;
const soon = (what: string) => Deadline.after(10_000, what);

/** A PF with two VFs, its admin virtqueue, and memory for a map. */
class Bench implements AsyncDisposable {
  private constructor(
    readonly vfs: TestVfs,
    readonly admin: RawAdmin,
    readonly push: PushMap,
  ) {}

  static async open(vfs: TestVfs, adminQueue = 0): Promise<Bench> {
    const admin = await RawAdmin.open(vfs.physical, adminQueue);
    return new Bench(vfs, admin, await PushMap.open(admin));
  }

  tracked(vf: number, mode: TrackingModeName, address: number, length: number): Tracked {
    return new Tracked(this.admin, vf, mode, { address, length }, this.push);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.admin[Symbol.asyncDispose]();
    this.push[Symbol.dispose]();
    await this.vfs[Symbol.asyncDispose]();
  }
}

/** A page behind the buffers that the ring takes for itself. */
const place = (driver: TestDriver, queue: number, page: number) => driver.queues[queue]!.ring.desc + (page + 64) * PAGE;

/** A read into a buffer that begins just before a page's end. @returns all pages that the device writes */
async function read(driver: TestDriver, page: number, bytes: number, sector = 0, queue = 0): Promise<number[]> {
  const at = (offset: number) => place(driver, queue, page + offset);
  driver.memory.write(at(0), blkHeader(BlkType.in, sector));
  const data = at(2) - 100;
  const done = driver.queues[queue]!.requestRaw([
    { address: at(0), length: 16, flags: 0 },
    { address: data, length: bytes, flags: W },
    { address: at(30), length: 1, flags: W },
  ]);
  await soon("a read").race(done);
  const pages = 1 + Math.ceil((bytes - 100) / PAGE);
  const failed = driver.memory.read(at(30), 1)[0] !== 0;
  const first = Array.from({ length: failed ? 0 : pages }, (_, index) => at(1 + index));
  return [driver.queues[queue]!.ring.desc, ...first, at(30)];
}

describe("blk", () => {
  let bench: Bench;
  beforeEach(async () => {
    bench = await Bench.open(await TestVfs.serve(2, { queues: 2 }));
  });
  afterEach(() => bench[Symbol.asyncDispose]());

  test.each(MODES)("each page that the device wrote is marked, no other, once: %s", async (mode) => {
    await using driver = await TestDriver.start(bench.vfs.vf(0), 2);
    const { gpa, size } = driver.memory;
    const all = bench.tracked(0, mode, gpa, size);
    expect(await all.start()).toBe(0);
    for (const [bytes, sector] of [
      [512, 0],
      [8192, 1],
      [65_536, 0],
      [512, 1 << 30],
    ] as const) {
      const written = [...(await read(driver, 0, bytes, sector)), ...(await read(driver, 5, bytes, sector, 1))];
      await bench.admin.steps(0, "quiesced", "freezed");
      expect(await all.take()).toEqual([...new Set(written)].sort((one, other) => one - other));
      expect(await all.take()).toEqual([]);
      await bench.admin.steps(0, "quiesced", "running");
    }
    expect(await all.stop()).toBe(0);
    // Of the ring, when the VF went on.
    bench.push.take();
    await read(driver, 0, 512);
    expect(bench.push.take().every((byte) => byte === 0)).toBe(true);

    // A part of that memory.
    const from = place(driver, 0, 2);
    const part = bench.tracked(0, mode, from, 20 * PAGE);
    expect(await part.start()).toBe(0);
    await read(driver, 0, 8192);
    await read(driver, 0, 512, 0, 1);
    await bench.admin.steps(0, "quiesced");
    expect(await part.take()).toEqual([from, from + PAGE]);
    expect(await part.stop()).toBe(0);
  });

  test("several VFs mark in one map at once, and none misses a page that changed", async () => {
    for (const mode of ["pushBitmap", "pushBytemap"] as const) {
      await using first = new MovedGuest();
      await using second = new MovedGuest();
      const guests = [first, second];
      const witnesses = guests.map(({ memory }) => new Witness(memory));
      const logs = guests.map(({ memory }, vf) => bench.tracked(vf, mode, GUEST_BASE, memory.size));
      for (const [vf, guest] of guests.entries()) {
        await guest.plug(bench.vfs.vf(vf));
        await bench.admin.steps(vf, "quiesced", "freezed");
        expect(await bench.admin.restore(vf, guest.blob())).toBe(0);
        witnesses[vf]!.begin();
        expect(await logs[vf]!.start()).toBe(0);
        await bench.admin.steps(vf, "quiesced", "running");
        guest.wake();
        guest.load(8);
      }
      await Promise.all(guests.map((guest) => guest.progress(200)));
      for (const vf of guests.keys()) await bench.admin.steps(vf, "quiesced", "freezed");
      const marked = new Set(await logs[0]!.take());
      for (const [vf, witness] of witnesses.entries()) {
        const changed = witness.changed();
        expect(changed.length).toBeGreaterThan(0);
        expect(changed.filter((page) => !marked.has(page))).toEqual([]);
        expect(await logs[vf]!.pending()).toBe(0);
        expect(await logs[vf]!.stop()).toBe(0);
        await bench.admin.steps(vf, "quiesced", "running");
      }
      for (const guest of guests) await guest.settle();
    }
  }, 20_000);

  test.each(MODES)(
    "tracking begins and ends under load, and misses nothing: %s",
    async (mode) => {
      await using guest = new MovedGuest(65_500);
      await guest.plug(bench.vfs.vf(0));
      await bench.admin.steps(0, "quiesced", "freezed");
      expect(await bench.admin.restore(0, guest.blob())).toBe(0);
      const witness = new Witness(guest.memory);
      const log = bench.tracked(0, mode, GUEST_BASE, guest.memory.size);
      guest.load(8);
      for (let round = 0; round < 8; round++) {
        witness.begin();
        expect(await log.start()).toBe(0);
        await bench.admin.steps(0, "quiesced", "running");
        guest.wake();
        await guest.progress(20);
        // Begun and ended while requests run.
        expect([await log.stop(), await log.start()]).toEqual([0, 0]);
        await bench.admin.steps(0, "quiesced", "freezed");
        await log.take();
        witness.begin();
        await bench.admin.steps(0, "quiesced", "running");
        guest.wake();
        const marked = new Set<number>();
        for (let look = 0; look < 5; look++) {
          await guest.progress(10);
          if (mode.startsWith("pull")) for (const page of await log.take()) marked.add(page);
        }
        await bench.admin.steps(0, "quiesced");
        if (round % 2 === 0) await bench.admin.steps(0, "freezed");
        for (const page of await log.take()) marked.add(page);
        const changed = witness.changed();
        expect(changed.length).toBeGreaterThan(0);
        expect(changed.filter((page) => !marked.has(page))).toEqual([]);
        expect(await log.stop()).toBe(0);
        if (round % 2 !== 0) await bench.admin.steps(0, "freezed");
      }
      await bench.admin.steps(0, "quiesced", "running");
      guest.wake();
      await guest.settle();
    },
    20_000,
  );

  test("a VF's reset goes past it, its PF's ends it", async () => {
    const { admin } = bench;
    const driver = await TestDriver.start(bench.vfs.vf(0));
    const log = bench.tracked(0, "pullBytemap", GUEST_BASE, 64 << 20);
    for (const status of ["quiesced", "freezed"] as const) await admin.steps(0, status);
    expect(await log.start()).toBe(0);
    await driver.device.reset(soon("reset"));
    expect(await log.pending()).toBe(16_384);
    await driver[Symbol.asyncDispose]();
    await using next = await TestDriver.start(bench.vfs.vf(0));
    const written = await read(next, 3, 512);
    expect(await log.take()).toEqual(written);
    await admin[Symbol.asyncDispose]();
    await using again = await RawAdmin.open(bench.vfs.physical);
    const other = new Tracked(again, 0, "pullBitmap", { address: GUEST_BASE, length: 64 << 20 }, bench.push);
    expect([await other.pending(), await other.stop(), await other.start()]).toEqual([-ERROR, ERROR, 0]);
    await read(next, 3, 512);
    expect(await other.take()).toEqual(written);
  });

  test("a map that the PF can reach no longer is lost, and known, and the VF goes on", async () => {
    await using driver = await TestDriver.start(bench.vfs.vf(0));
    const log = bench.tracked(0, "pushBitmap", GUEST_BASE, 64 << 20);
    expect(await log.start()).toBe(0);
    expect(await log.pending()).toBe(0);
    await bench.push.unmap();
    expect(await log.pending()).toBe(-INTERNAL);
    // What was marked before: the device may have written into its ring late.
    bench.push.take();
    await read(driver, 0, 512);
    expect(bench.push.take().every((byte) => byte === 0)).toBe(true);
    expect(await log.stop()).toBe(0);
    expect(await log.start()).toBe(DATA);
    await bench.push.map();
    expect([await log.start(), await log.pending()]).toEqual([0, 0]);
    await read(driver, 0, 512);
    expect((await log.take()).length).toBeGreaterThan(0);
    expect(await driver.device.status()).toBe(0x0f);
  });

  test("what makes no sense gets the code that says why, and changes nothing", async () => {
    const { admin } = bench;
    const range = { address: GUEST_BASE, length: 1 << 20 };
    const start = async (data: Uint8Array) => (await admin.tracking("startTracking", data)).status;
    expect(await start(startData(0, "pushBitmap", range, [[0x7000_0000, 32]]))).toBe(DATA);
    expect(await start(startData(0, "pushBitmap", range, [[bench.push.memory.gpa, 31]]))).toBe(ERROR);
    expect(await start(startData(7, "pullBitmap", range))).toBe(ERROR);
    expect(await start(startData(0, "pullBitmap", { ...range, length: 100 }))).toBe(ERROR);
    expect((await admin.send([header(65, 5)], 8)).status).toBe(COMMAND);
    const { status, result } = await admin.tracking("trackingIdentity", new Uint8Array(0), 8);
    expect([status, TRACKING_IDENTITY_RESULT.read(result)]).toEqual([
      0,
      { log2PagesPullBitmap: 22, log2PagesPullBytemap: 19, rangesMax: 256 },
    ]);
    expect((await admin.tracking("pendingMap", trackedRange(0, GUEST_BASE), 8)).status).toBe(ERROR);
    expect(await start(startData(0, "pullBitmap", range))).toBe(0);
    expect(await start(startData(0, "pullBitmap", { ...range, address: 0 }))).toBe(ERROR);
    expect((await admin.tracking("stopTracking", trackedRange(0, 0))).status).toBe(ERROR);
    // Another VF has its own.
    expect(await start(startData(1, "pullBitmap", range))).toBe(0);
    await bench.vfs.physical.fn.set("adminFault", "start-tracking@1:fail:1,pending-map@0:retry:1");
    const log = bench.tracked(0, "pullBitmap", GUEST_BASE, 1 << 20);
    expect([await log.pending(), await log.pending()]).toEqual([-0x01, 32]);
    expect(bench.vfs.warnings.length).toBeGreaterThan(5);
    const totals = bench.vfs.physical.commandTimes!();
    expect(totals.commands).toBeGreaterThan(10);
    expect(totals.microseconds).toBeGreaterThanOrEqual(totals.busyMicroseconds);
  });
});

test("the PF offers what its option says", async () => {
  for (const [tracking, bits] of [
    ["none", []],
    ["push-bytemap,pull-bitmap", [47, 48]],
    ["push-bitmap,push-bytemap,pull-bitmap,pull-bytemap", [46, 47, 48, 49]],
  ] as const) {
    await using bench = await Bench.open(await TestVfs.serve(1, {}, { tracking }));
    const { features } = bench.vfs.physical.fn.virtio;
    expect(Object.values(TRACKING_FEATURE).filter((bit) => hasFeature(features, bit))).toEqual([...bits]);
    const log = bench.tracked(0, "pullBytemap", 0, 1 << 20);
    expect(await log.start()).toBe(bits.length === 0 ? CLASS : bits.length === 2 ? ERROR : 0);
  }
});

test.each(MODES)("net: frames, used rings and answers of the control queue are marked: %s", async (mode) => {
  const HEADER = 12;
  const vfs = await serveNet(1, { backend: "echo", queues: 1 });
  await using bench = await Bench.open(vfs, 2);
  await using card = await NetDriver.start(vfs.vf(0));
  const { driver } = card;
  const { gpa, size } = driver.memory;
  const log = bench.tracked(0, mode, gpa, size);
  const rings = driver.queues.map(({ ring }) => ring.desc);
  expect(await log.start()).toBe(0);
  for (const bytes of [60, 1514]) {
    const at = place(driver, 0, 10) - HEADER - 60;
    const received = driver.queues[0]!.requestRaw([{ address: at, length: HEADER + 1514, flags: W }]);
    const back = soon("a frame").race(received);
    await card.send(
      encodeFrame({ to: [2, 0, 0, 0, 0, 9], from: [2, 0, 0, 0, 0, 0], stream: 1, sequence: 1, size: bytes }),
    );
    await back;
    const answer = place(driver, 2, 7);
    driver.memory.write(place(driver, 2, 0), Uint8Array.of(0, 0, 1));
    const asked = driver.queues[2]!.requestRaw([
      { address: place(driver, 2, 0), length: 3, flags: 0 },
      { address: answer, length: 1, flags: W },
    ]);
    await soon("a command").race(asked);
    expect(driver.memory.read(answer, 1)).toEqual(Uint8Array.of(0));
    await bench.admin.steps(0, "quiesced");
    const frame = bytes === 60 ? [place(driver, 0, 9)] : [place(driver, 0, 9), place(driver, 0, 10)];
    expect(await log.take()).toEqual([rings[0]!, ...frame, rings[1]!, rings[2]!, answer]);
    await bench.admin.steps(0, "running");
  }
  expect(await log.stop()).toBe(0);
});
