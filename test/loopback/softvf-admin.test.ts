import { afterEach, beforeEach, describe, expect, test } from "bun:test";
import fc from "fast-check";
import { Deadline } from "../../src/base/deadline.ts";
import { decodeState, encodeState, type VendorState } from "../../src/virtio/admin/state-blob.ts";
import {
  IDENTITY_RESULT,
  INTERNAL_STEPS,
  InternalStatus,
  type InternalStatusName,
  MODIFY_STATUS_DATA,
  STATUS_RESULT,
  stepsTo,
  VDEV_DATA,
} from "../../src/virtio/admin/vendor.ts";
import { NO_VECTOR } from "../../src/virtio/registers.ts";
import { readRequest } from "../kit/blk-requests.ts";
import { rejection } from "../kit/rejection.ts";
import { header, RawAdmin, transfer } from "./softvf-admin.ts";
import { GUEST_BASE, TestDriver, TestVfs } from "./softvf-driver.ts";
import { MovedGuest } from "./softvf-guest.ts";

/** Status bytes: the code, and "do not retry". */
const ERROR = 0x81;
const CLASS = 0x82;
const COMMAND = 0x83;
const DATA = 0x84;
const INTERNAL = 0x85;
const RETRY = 0x01;

const NAMES = Object.keys(InternalStatus) as InternalStatusName[];
const soon = (what: string) => Deadline.after(10_000, what);

let vfs: TestVfs;
let admin: RawAdmin;
beforeEach(async () => {
  vfs = await TestVfs.serve(3, { queues: 2, slow: 2, outOfOrder: true });
  admin = await RawAdmin.open(vfs.physical);
});
afterEach(async () => {
  await admin[Symbol.asyncDispose]();
  await vfs[Symbol.asyncDispose]();
});

const set = (option: string, value: string) => vfs.physical.fn.set(option, value);

/** A VF that nobody has used, brought to that status. */
async function bring(vf: number, to: InternalStatusName): Promise<void> {
  if (to === "init") return vfs.vf(vf).fn.reset();
  const from = await admin.status(vf);
  await admin.steps(vf, ...stepsTo(from as InternalStatusName, to));
}

/** Resolves when a running VF has taken that many requests of its first queue. */
async function taken(vf: number, requests: number): Promise<void> {
  await soon("a request that is taken").poll(async () => {
    const [queue] = decodeState(await admin.save(vf)).indices;
    return queue?.lastAvail === requests || undefined;
  }, 1);
}

describe("commands", () => {
  test("identity answers version 1.0.0; rings of the admin queue wrap", async () => {
    for (let count = 0; count < 200; count++) {
      const { status, result } = await admin.command("identity", [], 8);
      expect(status).toBe(0);
      expect(IDENTITY_RESULT.read(result)).toEqual({ major: 1, minor: 0, tertiary: 0 });
    }
  });

  test("what makes no sense gets the code that says why", async () => {
    const vdev = (vdevId: number) => VDEV_DATA.encode({ vdevId });
    const step = (status: number, vdevId = 1) => MODIFY_STATUS_DATA.encode({ vdevId, status });
    const cases: readonly [status: number, readable: readonly Uint8Array[], room: number][] = [
      [DATA, [Uint8Array.of(64)], 8],
      [CLASS, [header(66, 0)], 8],
      [CLASS, [header(0, 0)], 8],
      [COMMAND, [header(64, 6)], 8],
      [COMMAND, [header(64, 255)], 8],
      [DATA, [header(64, 0)], 0],
      [DATA, [header(64, 1)], 4],
      [DATA, [header(64, 1), vdev(1).subarray(0, 3)], 4],
      [DATA, [header(64, 1), vdev(1)], 3],
      [ERROR, [header(64, 1), vdev(0)], 4],
      [ERROR, [header(64, 1), vdev(4)], 4],
      [ERROR, [header(64, 1), vdev(0xffff)], 4],
      [DATA, [header(64, 2), step(2).subarray(0, 3)], 0],
      [ERROR, [header(64, 2), step(0)], 0],
      [ERROR, [header(64, 2), step(4)], 0],
      [ERROR, [header(64, 2), step(1, 9)], 0],
      [DATA, [header(64, 3), vdev(1)], 7],
      [ERROR, [header(64, 3), vdev(4)], 8],
      [DATA, [header(64, 4), transfer(0, 0, 16).subarray(0, 20)], 16],
      [DATA, [header(64, 4), transfer(0, 0, 17)], 16],
      [DATA, [header(64, 4), transfer(0, 0, 2 ** 52)], 16],
      [DATA, [header(64, 4), transfer(0, 16, 16)], 16],
      [DATA, [header(64, 4), transfer(0, 0, 65_536)], 65_536],
      [ERROR, [header(64, 4), transfer(7, 0, 16)], 16],
      [DATA, [header(64, 5), transfer(0, 0, 16), new Uint8Array(15)], 0],
      [ERROR, [header(64, 5), transfer(0, 0, 16), new Uint8Array(16)], 0],
      [ERROR, [header(64, 5), transfer(7, 0, 16), new Uint8Array(16)], 0],
    ];
    for (const [status, readable, room] of cases) {
      const sent = readable.map((part) => Buffer.from(part).toString("hex")).join(" ");
      expect([sent, (await admin.send(readable, room)).status]).toEqual([sent, status]);
    }
    // Data may come in one piece with the header, the result may have more room than it needs.
    const whole = new Uint8Array([...header(64, 1), ...VDEV_DATA.encode({ vdevId: 1 })]);
    const { status, result } = await admin.send([whole], 32);
    expect([status, STATUS_RESULT.read(result)]).toEqual([0, { status: InternalStatus.init }]);
    // A save at an offset before the state was begun anew.
    expect((await admin.savePiece(0, 4096, 0)).status).toBe(0);
  });

  test("every step that the status allows is taken, every other refused", async () => {
    for (const from of NAMES) {
      for (const to of NAMES) {
        await bring(0, "init");
        await bring(0, from);
        const legal = to !== "init" && INTERNAL_STEPS[from].includes(to);
        expect([from, to, await admin.step(0, to)]).toEqual([from, to, legal ? 0 : ERROR]);
        expect(await admin.status(0)).toBe(legal ? to : from);
      }
    }
  });

  test("a driver alone never notices; a reset leads to init from everywhere", async () => {
    await using driver = await TestDriver.start(vfs.vf(0), 2);
    expect(await admin.status(0)).toBe("running");
    expect(await driver.request(readRequest(0, 512))).toMatchObject({ status: 0 });
    for (const from of ["running", "quiesced", "freezed"] as const) {
      await bring(0, from);
      await driver.device.reset(soon("reset"));
      expect(await admin.status(0)).toBe("init");
    }
    await bring(0, "freezed");
    await driver[Symbol.asyncDispose]();
    await soon("the release").poll(async () => ((await admin.status(0)) === "init" ? true : undefined), 1);
    await using next = await TestDriver.start(vfs.vf(0), 2);
    expect(await next.request(readRequest(0, 512))).toMatchObject({ status: 0 });
  });
});

describe("faults and delays", () => {
  test("each fault ends as it is said to, on the VF that it is for, as often", async () => {
    await set("adminFault", "status@1:retry:2, modify@1:fail:1,pending:fail:1,identity:retry:1");
    expect([await admin.status(1), await admin.status(0), await admin.status(1), await admin.status(1)]).toEqual([
      RETRY,
      "init",
      RETRY,
      "init",
    ]);
    expect([await admin.step(0, "quiesced"), await admin.step(1, "quiesced")]).toEqual([0, INTERNAL]);
    expect(await admin.status(1)).toBe("init");
    expect(await admin.step(1, "quiesced")).toBe(0);
    expect((await rejection(admin.pending(2))).message).toContain("0x85");
    expect(await admin.pending(2)).toBe(4096);
    expect((await admin.command("identity", [], 8)).status).toBe(RETRY);

    await admin.steps(1, "freezed");
    await set("adminFault", "save@1:retry:1,restore@1:fail:1");
    const blob = await admin.save(0);
    expect((await admin.savePiece(1, 0, 16)).status).toBe(RETRY);
    expect(await admin.restore(1, blob)).toBe(INTERNAL);
    expect(await admin.restore(1, blob)).toBe(0);
  });

  test("a command that is never answered holds up no other, and dies with its queue", async () => {
    await set("adminFault", "status@0:silence:1");
    let answered = false;
    const silent = admin.status(0).then(
      () => {
        answered = true;
      },
      () => {},
    );
    expect([await admin.status(0), await admin.status(1)]).toEqual(["init", "init"]);
    expect(answered).toBe(false);
    await admin[Symbol.asyncDispose]();
    await silent;
    expect(answered).toBe(false);
    admin = await RawAdmin.open(vfs.physical);
    expect(await admin.status(0)).toBe("init");
  });

  test("commands of one VF come in order, those of others go past", async () => {
    await set("adminDelay", "modify=60");
    const order: string[] = [];
    const note = (what: string, done: Promise<unknown>) => done.then(() => order.push(what));
    await Promise.all([
      note("modify 0", admin.step(0, "running")),
      note("status 0", admin.status(0)),
      note("status 1", admin.status(1)),
      note("identity", admin.command("identity", [], 8)),
    ]);
    expect(order.slice(0, 2).sort()).toEqual(["identity", "status 1"]);
    expect(order.slice(2)).toEqual(["modify 0", "status 0"]);
    // A PF whose driver goes while its commands last: the next one is not kept waiting.
    await set("adminDelay", "3600000");
    admin.status(0).catch(() => {});
    admin.status(0).catch(() => {});
    await admin.command("getStatus", [], 4);
    await admin[Symbol.asyncDispose]();
    await set("adminDelay", "");
    admin = await RawAdmin.open(vfs.physical);
    expect(await admin.status(0)).toBe("running");
  });

  test("a device that does not drain is quiesced when it has, or not at all", async () => {
    await using driver = await TestDriver.start(vfs.vf(0), 2);
    await vfs.vf(0).fn.set("slow", 200);
    const request = driver.request(readRequest(0, 512));
    await taken(0, 1);
    expect(await admin.step(0, "quiesced")).toBe(0);
    driver.queues[0]!.collect();
    expect(driver.queues[0]!.ring.pending).toBe(0);
    expect(await request).toMatchObject({ status: 0 });
    await admin.steps(0, "running");

    await vfs.vf(0).fn.set("slow", 3_600_000);
    driver.request(readRequest(0, 512)).catch(() => {});
    await taken(0, 2);
    const quiesced = admin.step(0, "quiesced");
    expect(await admin.status(1)).toBe("init");
    await driver.device.reset(soon("reset"));
    expect(await quiesced).toBe(RETRY);
    expect(await admin.status(0)).toBe("init");
  });
});

describe("states", () => {
  /** A guest with VF 0, frozen. */
  async function frozen(index = 7) {
    const guest = new MovedGuest(index);
    await guest.plug(vfs.vf(0));
    await bring(0, "freezed");
    return guest;
  }

  test("what was restored is what is saved, in pieces of any size", async () => {
    await using guest = await frozen(65_535);
    const wanted = guest.state({ configVector: 0, queueSelect: 1, configGeneration: 9, deviceFeatureSelect: 1 });
    const blob = encodeState(wanted);
    for (const piece of [4096, 1024, 37]) {
      expect(await admin.restore(0, blob, piece)).toBe(0);
      const seen = decodeState(await admin.save(0, piece));
      expect(seen.common).toEqual({ ...wanted.common, deviceFeatures: seen.common.deviceFeatures });
      expect(seen.queues).toEqual(wanted.queues.map((queue) => ({ ...queue, notifyData: queue.index })));
      expect(seen.indices).toEqual([...wanted.indices]);
      expect(seen.config).toEqual(vfs.vf(0).fn.deviceConfig());
    }
    expect(await guest.device!.status()).toBe(0x0f);
    await admin.steps(0, "quiesced", "running");
    guest.wake();
    guest.load(4);
    await guest.progress(40);
    await guest.settle();
  });

  test("a state that does not fit is refused, and the VF goes on with its own", async () => {
    await using guest = await frozen();
    expect(await admin.restore(0, guest.blob())).toBe(0);
    const good = guest.state();
    const own = await admin.save(0);
    const common = (change: Partial<VendorState["common"]>) => ({ common: { ...good.common, ...change } });
    const queue = (change: Partial<VendorState["queues"][number]>) => ({
      queues: [{ ...good.queues[0]!, ...change }, good.queues[1]!],
    });
    const indices = (lastAvail: number, lastUsed: number) => ({ indices: [{ index: 0, lastAvail, lastUsed }] });
    const { memory } = guest;
    const bad: Readonly<Record<string, Partial<VendorState>>> = {
      "features that are not offered": common({ driverFeatures: good.common.driverFeatures | (1n << 63n) }),
      "no VERSION_1": common({ driverFeatures: 0n }),
      "DRIVER_OK without FEATURES_OK": common({ status: 7 }),
      "status bits that are none": common({ status: 0x1f }),
      "queues before FEATURES_OK": common({ status: 3 }),
      "too many queues": common({ numQueues: 3 }),
      "a vector that is not there": common({ configVector: 3 }),
      "a queue that is not there": queue({ index: 2 }),
      "a size that is none": queue({ size: 63 }),
      "a size above the largest": queue({ size: 512 }),
      "no size": queue({ size: 0 }),
      "a queue's vector": queue({ vector: 3 }),
      "half enabled": queue({ enable: 2 }),
      "another doorbell": queue({ notifyOff: 1 }),
      "a table that is not mapped": queue({ desc: BigInt(GUEST_BASE + memory.size - 64) }),
      "a ring at the end of the address space": queue({ driver: 0xffff_ffff_ffff_fffen }),
      "a table that is not aligned": queue({ desc: good.queues[0]!.desc + 8n }),
      "requests in flight and no list": indices(8, 7),
      "a list without requests in flight": { inFlight: [{ queue: 0, heads: [1] }] },
      "a list of a queue that is not there": { inFlight: [{ queue: 5, heads: [1] }] },
      "a head beyond the ring": { ...indices(8, 7), inFlight: [{ queue: 0, heads: [64] }] },
      "a head twice": { ...indices(9, 7), inFlight: [{ queue: 0, heads: [3, 3] }] },
      "more heads than the ring has": {
        ...indices(107, 7),
        inFlight: [{ queue: 0, heads: Array.from({ length: 100 }, (_, head) => head) }],
      },
      "completed chains": { completed: [{ queue: 0, heads: [1] }] },
    };
    for (const [what, change] of Object.entries(bad)) {
      expect([what, await admin.restore(0, encodeState({ ...good, ...change }))]).toEqual([what, DATA]);
      expect([what, await admin.step(0, "quiesced")]).toEqual([what, INTERNAL]);
      expect(await admin.save(0)).toEqual(own);
    }
    // The second queue comes to nothing, and so does the first.
    const second = { ...indices(9, 9), queues: [good.queues[0]!, { ...good.queues[1]!, device: 0x1000n }] };
    expect(await admin.restore(0, encodeState({ ...good, ...second }))).toBe(DATA);
    expect(await admin.save(0)).toEqual(own);
    expect(await admin.restore(0, guest.blob())).toBe(0);
    await admin.steps(0, "quiesced", "running");
    guest.wake();
    guest.load(4);
    await guest.progress(40);
    await guest.settle();
  });

  test("bytes that are no state are refused; a state that is not whole keeps the VF frozen", async () => {
    await using guest = await frozen();
    const blob = guest.blob();
    const word = (value: number, at: number, from = blob) => {
      const copy = from.slice();
      new DataView(copy.buffer).setUint32(at, value, true);
      return copy;
    };
    const short = word(31, 8, word(1, 0, new Uint8Array(4096)));
    for (const [what, bytes] of [
      ["no fields", word(0, 0)],
      ["too many fields", word(0xffff_ffff, 0)],
      ["a field that ends nowhere", word(0xffff_fff0, 8)],
      ["the first twice", word(0, 4 + 8 + 32)],
      ["a short structure", short],
      ["only padding", new Uint8Array(32 << 10)],
    ] as const) {
      expect([what, await admin.restore(0, bytes)]).toEqual([what, DATA]);
    }
    // More fields than there are bytes: the rest may still come, and does not.
    expect(await admin.restore(0, word(600, 0, new Uint8Array(4096)))).toBe(0);
    expect(await admin.step(0, "quiesced")).toBe(INTERNAL);
    expect(await admin.status(0)).toBe("freezed");
    // Pieces out of order.
    expect(await admin.restorePiece(0, 0, blob.subarray(0, 1024))).toBe(0);
    expect(await admin.restorePiece(0, 2048, blob.subarray(2048))).toBe(DATA);
    expect(await admin.step(0, "quiesced")).toBe(INTERNAL);
    // One that is whole mends it; so does a reset.
    expect(await admin.restore(0, blob)).toBe(0);
    expect(await admin.step(0, "quiesced")).toBe(0);
    await admin.steps(0, "freezed");
    expect(await admin.restorePiece(0, 0, blob.subarray(0, 1024))).toBe(0);
    await guest.device!.reset(soon("reset"));
    expect(await admin.restorePiece(0, 1024, blob.subarray(1024))).toBe(ERROR);
    await admin.steps(0, "quiesced", "freezed");
    expect(await admin.restorePiece(0, 1024, blob.subarray(1024))).toBe(DATA);
    await admin.steps(0, "quiesced");
  });

  test("a head in flight whose chain makes no sense costs that VF, no other", async () => {
    await using guest = await frozen();
    guest.queues[0]!.ring.writeDescriptor(5, { address: 0xdead_0000, length: 1, flags: 1, next: 5 });
    const state = guest.state();
    const indices = [{ index: 0, lastAvail: 8, lastUsed: 7 }];
    expect(await admin.restore(0, encodeState({ ...state, indices, inFlight: [{ queue: 0, heads: [5] }] }))).toBe(0);
    await admin.steps(0, "quiesced");
    await soon("the failure").poll(async () => ((await guest.device!.status()) === 0x4f ? true : undefined), 1);
    await using driver = await TestDriver.start(vfs.vf(1));
    expect(await driver.request(readRequest(0, 512))).toMatchObject({ status: 0 });
    await guest.device!.reset(soon("reset"));
    expect(await admin.status(0)).toBe("init");
  });

  test("whatever a state says, it is refused or costs that VF alone", async () => {
    await using guest = new MovedGuest(7);
    await guest.plug(vfs.vf(0));
    await using neighbour = await TestDriver.start(vfs.vf(1));
    const good = guest.blob();
    const fields = Array.from({ length: 160 }, (_, at) => at);
    const value = fc.oneof(fc.constantFrom(0, 1, 2, 7, 8, 0x7f, 0xff), fc.nat(0xff));
    const changes = fc.array(fc.tuple(fc.constantFrom(...fields), value), { minLength: 1, maxLength: 4 });
    let taken = 0;
    await fc.assert(
      fc.asyncProperty(changes, async (bytes) => {
        const blob = good.slice();
        for (const [at, byte] of bytes) blob[at] = byte;
        await bring(0, "init");
        await bring(0, "freezed");
        const status = await admin.restore(0, blob);
        expect([0, DATA]).toContain(status);
        const step = await admin.step(0, "quiesced");
        expect([0, INTERNAL]).toContain(step);
        if (status !== 0 || step !== 0) return;
        taken++;
        await admin.steps(0, "running");
        guest.wake();
        expect(await admin.status(0)).toBe("running");
      }),
      { numRuns: 300, seed: 3 },
    );
    expect(taken).toBeGreaterThan(20);
    expect(await neighbour.request(readRequest(0, 512))).toMatchObject({ status: 0 });
  });

  test("memory may go and come back under a frozen VF, and what was in flight goes on", async () => {
    await set("freeze", "list");
    await using guest = await frozen();
    expect(await admin.restore(0, guest.blob())).toBe(0);
    await admin.steps(0, "quiesced", "running");
    guest.wake();
    await vfs.vf(0).fn.set("slow", 20);
    guest.load(6);
    await guest.progress(20);
    await admin.steps(0, "quiesced", "freezed");
    const before = await admin.save(0);
    expect(decodeState(before).inFlight).not.toEqual([]);
    await guest.unmap();
    expect(await admin.save(0)).toEqual(before);
    expect(await guest.device!.status()).toBe(0x0f);
    // Without memory it cannot go on, and says so.
    expect(await admin.step(0, "quiesced")).toBe(DATA);
    expect(await admin.status(0)).toBe("freezed");
    await guest.map();
    await admin.steps(0, "quiesced", "running");
    guest.wake();
    await guest.progress(20);
    await guest.settle();
  });

  test("what a driver writes while its VF is frozen starts nothing until it is let go", async () => {
    await using driver = await TestDriver.connect(vfs.vf(1));
    await bring(1, "freezed");
    await driver.run(1);
    expect([await driver.device.status(), await admin.status(1)]).toEqual([0x0f, "freezed"]);
    let done = false;
    const request = driver.request(readRequest(0, 512)).then((result) => {
      done = true;
      return result;
    });
    await Bun.sleep(10);
    await admin.steps(1, "quiesced");
    await Bun.sleep(10);
    expect([done, await admin.status(1)]).toEqual([false, "quiesced"]);
    await admin.steps(1, "running");
    expect(await request).toMatchObject({ status: 0 });
  });

  test("a VF without a driver has a state too, and another takes it", async () => {
    await bring(1, "freezed");
    const blob = await admin.save(0);
    const { common, queues, indices } = decodeState(blob);
    expect([common.status, common.numQueues, common.configVector, indices]).toEqual([0, 2, NO_VECTOR, []]);
    expect(queues.map(({ enable, size }) => [enable, size])).toEqual([
      [0, 256],
      [0, 256],
    ]);
    expect(await admin.restore(1, blob)).toBe(0);
    await admin.steps(1, "quiesced", "running");
    await using driver = await TestDriver.start(vfs.vf(1), 2);
    expect(await driver.request(readRequest(0, 512))).toMatchObject({ status: 0 });
  });
});

test("a PF that moves nothing has no admin virtqueue", async () => {
  await using plain = await TestVfs.serve(1, {}, { migration: "none" });
  expect(plain.physical.fn.layout.queues).toBe(0);
  await using driver = await TestDriver.start(plain.vf(0));
  expect(await driver.request(readRequest(0, 512))).toMatchObject({ status: 0 });
  expect((await rejection(TestVfs.serve(1, {}, { migration: "maybe" }))).message).toContain(
    "must be one of vendor, none",
  );
});
