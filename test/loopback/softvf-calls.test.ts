import { dlopen } from "bun:ffi";
import { afterEach, beforeEach, expect, test } from "bun:test";
import { Deadline } from "../../src/base/deadline.ts";
import { eventfd } from "../../src/native/sys.ts";
import { decodeState, encodeState } from "../../src/virtio/admin/state-blob.ts";
import { flushRequest, readRequest, SECTOR } from "../kit/blk-requests.ts";
import { fullEventfd } from "../unit/native/full-eventfd.ts";
import { RawAdmin } from "./softvf-admin.ts";
import { TestDriver, TestVfs } from "./softvf-driver.ts";
import { MovedGuest } from "./softvf-guest.ts";

const INTERNAL = 0x85;
const soon = (what: string) => Deadline.after(10_000, what);

const libc = dlopen("libc.so.6", {
  getrlimit: { args: ["i32", "ptr"], returns: "i32" },
  setrlimit: { args: ["i32", "ptr"], returns: "i32" },
}).symbols;
const RLIMIT_NOFILE = 7;

/** No descriptor is left in this process, which holds softvf too, while `run` lasts. */
async function withoutDescriptors<T>(run: () => Promise<T>): Promise<T> {
  const limits = new BigUint64Array(2);
  libc.getrlimit(RLIMIT_NOFILE, limits);
  let lowest: number;
  {
    using free = eventfd();
    lowest = free.number;
  }
  libc.setrlimit(RLIMIT_NOFILE, BigUint64Array.of(BigInt(lowest), limits[1]!));
  try {
    return await run();
  } finally {
    libc.setrlimit(RLIMIT_NOFILE, limits);
  }
}

let vfs: TestVfs;
let admin: RawAdmin;
beforeEach(async () => {
  vfs = await TestVfs.serve(1, { queues: 2 });
  admin = await RawAdmin.open(vfs.physical);
});
afterEach(async () => {
  await admin[Symbol.asyncDispose]();
  await vfs[Symbol.asyncDispose]();
});

test("a guest whose calls block is drained, frozen and let go all the same", async () => {
  await using guest = await TestDriver.start(vfs.vf(0));
  using full = fullEventfd();
  await guest.fn.interrupts.route(1, full.number);
  const [queue] = guest.queues;
  // Before it waits for the disk, to flush, the worker shows what it has done, and calls.
  for (const { readable, writable } of [readRequest(0, SECTOR), flushRequest(), flushRequest()]) {
    queue!.ring.submit(readable, writable);
  }
  await guest.fn.doorbell(4, 0x3000).ring(0);
  await soon("the first request").poll(() => {
    queue!.collect();
    return queue!.returned > 0 || undefined;
  }, 1);
  await Bun.sleep(10);
  await admin.steps(0, "quiesced", "freezed");
  const [indices] = decodeState(await admin.save(0)).indices;
  expect(indices!.lastUsed).toBe(indices!.lastAvail);
  await admin.steps(0, "quiesced", "running");
  await guest.device.reset(soon("reset"));
});

test("a state for whose calls there is no descriptor leaves the VF as it was", async () => {
  await using guest = new MovedGuest(7);
  await guest.plug(vfs.vf(0));
  await admin.steps(0, "quiesced", "freezed");
  expect(await admin.restore(0, guest.blob())).toBe(0);
  const own = await admin.save(0);
  const indices = [0, 1].map((index) => ({ index, lastAvail: 9, lastUsed: 9 }));
  const other = encodeState({ ...guest.state({ configVector: 0 }), indices });
  expect(await withoutDescriptors(() => admin.restore(0, other))).toBe(INTERNAL);
  expect(await admin.save(0)).toEqual(own);
  expect(await admin.restore(0, other)).toBe(0);
  expect(await admin.restore(0, own)).toBe(0);
  await admin.steps(0, "quiesced", "running");
  guest.wake();
  guest.load(4);
  await guest.progress(40);
  await guest.settle();
});
