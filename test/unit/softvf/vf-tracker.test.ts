import { expect, test } from "bun:test";
import { VhostdError } from "../../../src/base/errors.ts";
import type { RingLog } from "../../../src/native/ring-log.ts";
import { AdminError } from "../../../src/softvf/admin-error.ts";
import { type TrackingPlan, VfTracker } from "../../../src/softvf/vf-tracker.ts";
import type { TrackingModeName } from "../../../src/virtio/admin/vendor.ts";
import { rejection } from "../../kit/rejection.ts";

/** A log that does what it is told, later where it `waits`. */
class Log implements Pick<RingLog, "start" | "stop" | "cut" | "loss" | "take"> {
  readonly done: string[] = [];
  loss: string | undefined;
  fails: VhostdError | undefined;
  waits: Promise<void> = Promise.resolve();

  async start(...[map, , lent, wanted]: Parameters<RingLog["start"]>): Promise<void> {
    await this.waits;
    if (this.fails !== undefined) throw this.fails;
    if (!wanted()) throw new VhostdError("cancelled", "not wanted");
    this.done.push(`start ${map} ${lent === undefined ? "own" : lent.places.length}`);
  }

  async stop(): Promise<void> {
    await this.waits;
    if (this.fails !== undefined) throw this.fails;
    this.done.push("stop");
  }

  cut(): void {
    this.done.push("cut");
  }

  take(offset: number, length: number): Uint8Array {
    this.done.push(`take ${offset} ${length}`);
    return new Uint8Array(length);
  }
}

function vf() {
  const log = new Log();
  return { log, tracker: new VfTracker(log, {} as RingLog) };
}

const plan = (mode: TrackingModeName, address = 0x10_0000): TrackingPlan => ({
  mode,
  range: { address, length: 100 << 12, pageSize: 4096 },
  places: [{ address: 0, length: 4096 }],
});

/** Status byte of a refusal, and whether trying again makes sense. */
async function refused(run: () => unknown): Promise<string> {
  const error = await rejection((async () => run())());
  if (!(error instanceof AdminError)) throw error;
  return `${error.code}${error.retry ? ", retry" : ""}: ${error.message}`;
}

test("one range at a time is tracked, in any mode, and named by its address", async () => {
  const { log, tracker } = vf();
  const [address, end] = [0x10_0000, 0x10_0000 + (100 << 12)];
  expect(await refused(() => tracker.stop(address))).toBe("error: no range at 0x100000 is tracked; nothing is");
  expect(await refused(() => tracker.pending(0))).toContain("nothing is");
  const pending = { pushBitmap: 0, pushBytemap: 0, pullBitmap: 13, pullBytemap: 100 };
  for (const [mode, bytes] of Object.entries(pending) as [TrackingModeName, number][]) {
    await tracker.start(plan(mode));
    expect(await refused(() => tracker.start(plan(mode)))).toContain("error: 0x100000+0x64000 is tracked already");
    expect(await refused(() => tracker.start(plan(mode, 0)))).toContain("is tracked already");
    expect(tracker.pending(address)).toBe(bytes);
    for (const wrong of [0, address + 1, end]) {
      expect(await refused(() => tracker.pending(wrong))).toContain("0x100000+0x64000 is");
    }
    expect(await refused(() => tracker.stop(0))).toContain("error: no range at 0x0");
    await tracker.stop(mode === "pullBitmap" ? end : address);
  }
  expect(log.done.filter((each) => each !== "stop")).toEqual([
    "start bitmap 1",
    "start bytemap 1",
    "start bitmap own",
    "start bytemap own",
  ]);
});

test("a report lies in the map of a pull mode", async () => {
  const { log, tracker } = vf();
  await tracker.start(plan("pushBitmap", 0));
  expect(await refused(() => tracker.report(0, 0, 1))).toContain("in memory of the PF: nothing is reported");
  await tracker.stop(0);
  await tracker.start(plan("pullBitmap", 0));
  expect(tracker.report(0, 5, 8)).toHaveLength(8);
  for (const [offset, length] of [
    [5, 9],
    [14, 0],
    [2 ** 60, 1],
  ] as const) {
    expect(await refused(() => tracker.report(0, offset, length))).toContain("of a map of 13");
  }
  expect(log.done.filter((each) => each.startsWith("take"))).toEqual(["take 5 8"]);
});

test("a log that was lost is known until it is stopped", async () => {
  const { log, tracker } = vf();
  await tracker.start(plan("pushBitmap", 0));
  log.loss = "unmapped";
  expect(await refused(() => tracker.pending(0))).toBe("internal: not all pages are marked any more: unmapped");
  expect(await refused(() => tracker.report(0, 0, 1))).toStartWith("internal: ");
  expect(await refused(() => tracker.start(plan("pushBitmap", 0)))).toContain("is tracked already");
  await tracker.stop(0);
  log.loss = undefined;
  await tracker.start(plan("pullBitmap", 0));
  expect(tracker.pending(0)).toBe(13);
});

test("what fails leaves things as they were", async () => {
  const { log, tracker } = vf();
  log.fails = new VhostdError("invalid", "not mapped");
  expect(await refused(() => tracker.start(plan("pushBitmap", 0)))).toBe("dataTransfer: not mapped");
  log.fails = undefined;
  await tracker.start(plan("pushBitmap", 0));
  log.fails = new VhostdError("timedOut", "the disk");
  expect(await refused(() => tracker.stop(0))).toBe("error, retry: the disk");
  expect(tracker.pending(0)).toBe(0);
  log.fails = undefined;
  await tracker.stop(0);
});

test("a reset of the PF ends it, also what has only begun", async () => {
  const { log, tracker } = vf();
  await tracker.start(plan("pullBitmap", 0));
  tracker.forget();
  expect(log.done.at(-1)).toBe("cut");
  expect(await refused(() => tracker.pending(0))).toContain("nothing is");
  const gate = Promise.withResolvers<void>();
  log.waits = gate.promise;
  const began = refused(() => tracker.start(plan("pullBitmap", 0)));
  tracker.forget();
  gate.resolve();
  expect(await began).toBe("error, retry: not wanted");
  expect(await refused(() => tracker.pending(0))).toContain("nothing is");
});
