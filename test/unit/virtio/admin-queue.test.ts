import { describe, expect, test } from "bun:test";
import { adminQueue, CONFIG_SPACE } from "../../../plugins/net/config-space.ts";
import { FeatureBit, featureBits } from "../../../src/virtio/features.ts";
import { deathOf, type FakeAdmin, type FakeAnswer } from "../../kit/fake-admin.ts";
import { rejection } from "../../kit/rejection.ts";
import { cleanUpAfterEach, make, open, soon, until } from "./admin-lab.ts";

cleanUpAfterEach();

describe("discovery", () => {
  const class0 = { configSpace: {}, adminQueue: () => 0 };

  test("negotiates three features and no more, sets the one queue up, and learns the version", async () => {
    const features = featureBits(5, 28, FeatureBit.accessPlatform, FeatureBit.ringReset, FeatureBit.adminVq);
    const fake = make({ features });
    expect(await fake.discover()).toMatchObject({ kind: "vendor", version: "1.0.0" });
    expect(fake.fn.driverFeatures).toBe(featureBits(32, 33, 41));
    expect(fake.fn.queues[0]).toMatchObject({ size: 2048, vector: 1, enable: 1 });
    expect(fake.fn.status).toBe(0x0f);
  });

  test("asks the class with what the PF says of itself", async () => {
    const fake = make({ queue: 3, config: Uint8Array.of(3, 0) });
    const configSpace = { pairs: [0, "u16"] } as const;
    const adminQueue = (config: Readonly<Record<string, number | bigint>>, features: bigint) =>
      (features & featureBits(41)) === 0n ? 0 : Number(config["pairs"]);
    expect(await fake.discover({ configSpace, adminQueue })).toMatchObject({ kind: "vendor" });
    expect(fake.fn.queues.map(({ enable }) => enable)).toEqual([0, 0, 0, 1]);
  });

  test("of a network PF is behind its data queues, as many as it says; behind one pair without MQ", async () => {
    for (const [pairs, mq, queue] of [
      [4, true, 8],
      [1, true, 2],
      [4, false, 2],
    ] as const) {
      const features = featureBits(...(mq ? [22] : []), FeatureBit.accessPlatform, FeatureBit.adminVq);
      const fake = make({ virtioId: 1, queue, features, config: new Uint8Array(24).with(8, pairs) });
      const device = { configSpace: CONFIG_SPACE, adminQueue };
      expect(await fake.discover(device)).toMatchObject({ kind: "vendor" });
      expect(fake.fn.queues.flatMap(({ enable }, index) => (enable === 1 ? [index] : []))).toEqual([queue]);
    }
  });

  test("believes the registers before the class", async () => {
    const fake = make({ queue: 2 });
    const region = fake.fn.region.bind(fake.fn);
    fake.fn.region = (bar) => {
      const space = region(bar);
      const admin: Record<number, number> = { 60: 2, 62: 1 };
      // Valid only once ADMIN_VQ is negotiated.
      const valid = () => (fake.fn.driverFeatures & featureBits(41)) !== 0n;
      return {
        ...space,
        read: async (offset, width) =>
          valid() && admin[offset] !== undefined ? admin[offset] : space.read(offset, width),
      };
    };
    expect(await fake.discover(class0)).toMatchObject({ kind: "vendor" });
    expect(fake.fn.queues.map(({ enable }) => enable)).toEqual([0, 0, 1]);
  });

  test("a PF without the feature bits has none, and is not touched", async () => {
    for (const [bits, reason] of [
      [[33], /ADMIN_VQ/],
      [[41], /ACCESS_PLATFORM/],
    ] as const) {
      const fake = make({ features: featureBits(...bits) });
      expect(await fake.discover()).toEqual({ kind: "none", reason: expect.stringMatching(reason) });
      expect(fake.fn.statusWrites).toEqual([]);
      expect(fake.domain.owners).toEqual([]);
    }
  });

  test("a PF that speaks other commands has none, and nothing is left behind", async () => {
    const fake = make();
    fake.answer = () => ({ status: 0x82 });
    expect(await fake.discover()).toMatchObject({ kind: "none", reason: expect.stringMatching(/vendor's commands/) });
    expect(fake.fn.status).toBe(0);
    expect(fake.domain.owners).toEqual([]);
  });

  test("a queue that does not work is an error that says why, and nothing is left behind", async () => {
    const cases: [(fake: FakeAdmin) => void, RegExp, typeof class0?][] = [
      [(fake) => Object.assign(fake.fn.faults, { queueEnableIgnored: true }), /did not take queue 0/],
      [(fake) => Object.assign(fake, { answer: () => ({ status: 0x85 }) }), /refused identity of the PF: internal/],
      [(fake) => Object.assign(fake, { answer: () => "silence" }), /did not answer identity/],
      [() => {}, /queue 7 of 1/, { configSpace: {}, adminQueue: () => 7 }],
      [() => {}, /neither the PF nor/, { configSpace: {} } as typeof class0],
    ];
    for (const [bend, reason, deviceClass] of cases) {
      const fake = make();
      bend(fake);
      const refused = fake.discover(deviceClass ?? class0, soon(100));
      expect(await rejection(refused)).toMatchObject({ code: "adminQueue", message: expect.stringMatching(reason) });
      expect(fake.fn.status).toBe(0);
      expect(fake.domain.owners).toEqual([]);
    }
  });
});

describe("commands", () => {
  test("several are in flight and each gets its own answer, in whatever order", async () => {
    const { fake, admin } = await open({ vfs: 8 });
    fake.vfs[3]!.change("quiesced");
    const held: (() => void)[] = [];
    fake.answer = (command) => new Promise<FakeAnswer>((resolve) => held.push(() => resolve(fake.honest(command))));
    const asked = [1, 2, 3, 4, 5, 6, 7, 8].map((vdev) => admin.status(vdev, soon()));
    await until(() => held.length === 8);
    for (const release of held.reverse()) release();
    expect(await Promise.all(asked)).toEqual(["init", "init", "init", "quiesced", "init", "init", "init", "init"]);
  });

  test("more than there are slots wait their turn; the indices wrap", async () => {
    const { fake, admin } = await open({ queueSize: 8 });
    let most = 0;
    let inFlight = 0;
    fake.answer = async (command) => {
      most = Math.max(most, ++inFlight);
      await Bun.sleep(0);
      inFlight--;
      return fake.honest(command);
    };
    await Promise.all(Array.from({ length: 40 }, () => admin.status(1, soon())));
    expect(fake.seen.length).toBe(41);
    expect(most).toBe(1);
  });

  test("a device that raises no interrupt is looked at", async () => {
    for (const vectors of [2, 1]) {
      const fake = make({ vectors });
      fake.interrupts = false;
      const admin = await fake.open();
      expect(await admin.status(1, soon())).toBe("init");
    }
  });

  test("one that is never answered expires alone; its slot comes back when it is", async () => {
    const { fake, admin } = await open();
    fake.answer = (command) => (command.vdevId === 1 && command.name === "save" ? "silence" : fake.honest(command));
    fake.vfs[0]!.blob = new Uint8Array(4096);
    const silent = admin.save(1, soon(300));
    await until(() => fake.commands("save").length === 1);
    const other = admin.status(2, soon());
    expect(await rejection(silent)).toMatchObject({
      code: "stateSave",
      message: expect.stringMatching(/save of virtfn0/),
    });
    expect(await other).toBe("init");
    const { head } = fake.commands("save")[0]!;
    // Others were answered meanwhile: nobody has to ask whether there is life.
    expect(fake.commands("identity").length).toBe(1);
    fake.complete(head);
    expect(await admin.status(1, soon())).toBe("init");
    await until(() => admin.queue.state.kind === "ready");
    await Promise.all(Array.from({ length: 60 }, () => admin.status(2, soon())));
    expect(fake.seen.filter((command) => command.head === head).length).toBeGreaterThan(1);
  });

  test("all VFs of a PF can have one in flight", async () => {
    const { fake, admin } = await open({ vfs: 256 });
    const held: (() => void)[] = [];
    fake.answer = (command) => new Promise<FakeAnswer>((resolve) => held.push(() => resolve(fake.honest(command))));
    const asked = fake.vfs.map((_, index) => admin.status(index + 1, soon()));
    await until(() => held.length === 256);
    for (const release of held) release();
    await Promise.all(asked);
  });

  test("VFs that are never answered do not use up the slots of others", async () => {
    const { fake, admin } = await open({ vfs: 60, queueSize: 256 });
    fake.answer = (command) => (command.vdevId <= 13 ? "silence" : fake.honest(command));
    const asked = Array.from({ length: 13 }, (_, index) => admin.status(index + 1, soon(20)));
    expect((await Promise.allSettled(asked)).every(({ status }) => status === "rejected")).toBe(true);
    const seen = fake.seen.length;
    for (const vdev of [1, 13]) {
      expect(await rejection(admin.status(vdev, soon()))).toMatchObject({
        code: "busy",
        message: expect.stringContaining(`never answered 1 commands of virtfn${vdev - 1}`),
      });
    }
    expect(fake.seen.slice(seen)).toEqual([]);
    expect(await Promise.all([20, 40, 60].map((vdev) => admin.status(vdev, soon())))).toEqual(["init", "init", "init"]);
  });

  test("a device that is slow with all that it has is not dead", async () => {
    const { fake, admin } = await open({ vfs: 60, queueSize: 256, timeouts: { lifeSign: 50 } });
    const held: (() => void)[] = [];
    fake.answer = (command) =>
      command.name === "identity"
        ? fake.honest(command)
        : new Promise<FakeAnswer>((resolve) => held.push(() => resolve(fake.honest(command))));
    const slow = Array.from({ length: 50 }, (_, index) => admin.status(index + 1, soon()));
    await until(() => held.length === 50);
    // One that the device never got says nothing about the device.
    expect(await rejection(admin.status(60, soon(20)))).toMatchObject({
      code: "io",
      message: expect.stringMatching(/was never asked for getStatus of virtfn59: .*waited for a free slot, 0 of 50/),
    });
    await Bun.sleep(80);
    expect(admin.queue.state).toEqual({ kind: "ready" });
    expect(fake.commands("identity").length).toBe(1);
    for (const release of held) release();
    await Promise.all(slow);

    // The life sign needs no slot of theirs.
    fake.answer = (command) => (command.name === "identity" ? fake.honest(command) : "silence");
    const lost = Array.from({ length: 50 }, (_, index) => admin.status(index + 1, soon(20)));
    expect((await Promise.allSettled(lost)).every(({ status }) => status === "rejected")).toBe(true);
    await until(() => fake.commands("identity").length === 2);
    await Bun.sleep(80);
    expect(admin.queue.state).toEqual({ kind: "ready" });
    expect((await rejection(admin.status(60, soon(20)))).message).toMatch(
      /50 of 50 are held by commands that were never answered/,
    );
  });

  test("a VF is not altered while an earlier command may still alter it", async () => {
    const { fake, admin } = await open({ queueSize: 16 });
    const held: (() => void)[] = [];
    fake.answer = (command) => {
      if (command.name === "modifyStatus") return "silence";
      return new Promise<FakeAnswer>((resolve) => held.push(() => resolve(fake.honest(command))));
    };
    const other = admin.status(2, soon());
    const never = admin.modify(1, "quiesced", soon(20));
    const waiting = admin.modify(1, "running", soon());
    expect(await rejection(never)).toMatchObject({ code: "quiesceFailed" });
    fake.answer = (command) => fake.honest(command);
    held[0]!();
    await other;
    const busy = { code: "busy", message: expect.stringMatching(/may still alter virtfn0/) };
    expect(await rejection(waiting)).toMatchObject(busy);
    expect(await rejection(admin.modify(1, "running", soon()))).toMatchObject(busy);
    expect(admin.obstacle(1)).toMatch(/may still alter virtfn0/);
    expect(admin.obstacle(2)).toBeUndefined();
    await admin.modify(2, "quiesced", soon());
    fake.complete(fake.commands("modifyStatus", 1)[0]!.head);
    await until(() => admin.obstacle(1) === undefined);
    await admin.modify(1, "running", soon());
  });

  test("one that expires while it waits for a slot is never given to the device", async () => {
    const { fake, admin } = await open({ queueSize: 8 });
    const held: (() => void)[] = [];
    fake.answer = (command) => new Promise<FakeAnswer>((resolve) => held.push(() => resolve(fake.honest(command))));
    const first = admin.status(1, soon());
    const expired = admin.modify(2, "quiesced", soon(20));
    expect(await rejection(expired)).toMatchObject({ code: "quiesceFailed" });
    fake.answer = (command) => fake.honest(command);
    held[0]!();
    expect(await first).toBe("init");
    expect(await admin.status(2, soon())).toBe("init");
    expect(fake.commands("modifyStatus")).toEqual([]);
  });

  test("one that comes back without a status was not carried out", async () => {
    const { fake, admin } = await open();
    fake.answer = (command) => {
      queueMicrotask(() => fake.complete(command.head));
      return "silence";
    };
    expect((await rejection(admin.modify(1, "quiesced", soon()))).message).toMatch(/code 127/);
  });

  test("a refusal is tried again unless the device says not to", async () => {
    const { fake, admin } = await open();
    let refusals = 3;
    fake.answer = (command) => (refusals-- > 0 ? { status: 5 } : fake.honest(command));
    expect(await admin.status(1, soon())).toBe("init");
    fake.answer = () => ({ status: 0x85 });
    const before = fake.seen.length;
    expect(await rejection(admin.modify(2, "quiesced", soon()))).toMatchObject({
      code: "quiesceFailed",
      message: "0000:5a:00.1 refused modifyStatus of virtfn1: internal (code 5)",
    });
    expect(fake.seen.length).toBe(before + 1);
    fake.answer = () => ({ status: 1 });
    const endless = admin.modify(2, "freezed", soon(60));
    expect(await rejection(endless)).toMatchObject({
      code: "freezeFailed",
      message: expect.stringMatching(/error \(code 1\), also after \d+ more tries/),
    });
  });

  test("a state goes over in pieces and comes back the same", async () => {
    const { fake, admin } = await open();
    const [vf] = fake.vfs;
    for (const step of ["quiesced", "freezed"] as const) await admin.modify(1, step, soon());
    const others = [{ type: 10, bytes: crypto.getRandomValues(new Uint8Array(50_000)) }];
    const common = { numQueues: 0, status: 0, configGeneration: 0, configVector: 0, queueSelect: 0 };
    const selects = { deviceFeatureSelect: 0, driverFeatureSelect: 0, deviceFeatures: 1n, driverFeatures: 1n };
    const empty = { config: new Uint8Array(0), queues: [], indices: [], inFlight: [], completed: [] };
    const state = { common: { ...common, ...selects }, others, ...empty };
    await admin.restore(1, state, soon());
    await admin.modify(1, "quiesced", soon());
    expect(vf!.restored).toEqual([state]);
    expect(await admin.save(1, soon())).toEqual(state);
    expect(fake.commands("save").length).toBe(4);
  });

  test("what a device says of its state is not believed", async () => {
    const { fake, admin } = await open();
    for (const size of [0n, (16n << 20n) + 1n, 1n << 63n]) {
      const result = new Uint8Array(new BigUint64Array([size]).buffer);
      fake.answer = () => ({ status: 0, result });
      expect(await rejection(admin.save(1, soon()))).toMatchObject({
        code: "stateSave",
        message: `virtfn0 has ${size} bytes of state; 1 to 16777216`,
      });
    }
    fake.answer = (command) => fake.honest(command);
    fake.vfs[0]!.blob = new Uint8Array(4096).fill(0xff);
    expect((await rejection(admin.save(1, soon()))).message).toMatch(/malformed/);
    fake.answer = () => ({ status: 0, result: Uint8Array.of(9) });
    expect((await rejection(admin.status(1, soon()))).message).toMatch(/internal status 9; 0 to 3/);
  });
});

describe("a dead queue", () => {
  type Lie = [string, (fake: FakeAdmin) => void, RegExp];
  const lies: Lie[] = [
    ["an id beyond the ring", (fake) => fake.complete(0x8000_0000), /descriptor 2147483648/],
    ["an id that is no head", (fake) => fake.complete(1), /descriptor 1 is no command's first/],
    ["a head that is not in flight", (fake) => fake.complete(50), /came back twice/],
    ["an index that jumps", (fake) => fake.setUsedIndex(0x7000), /used index moved by/],
    ["an index that goes back", (fake) => fake.setUsedIndex(0), /used index moved by/],
  ];
  test.each(lies)("is what a lie makes of it: %s", async (_, lie, reason) => {
    const { fake, admin } = await open();
    const reasons: string[] = [];
    admin.queue.onDead((error) => reasons.push(error.message));
    fake.answer = () => "silence";
    const waiting = admin.status(1, soon());
    lie(fake);
    expect(await rejection(waiting)).toMatchObject({ code: "adminQueue", message: expect.stringMatching(reason) });
    expect(admin.queue.state).toMatchObject({ kind: "dead", reason: expect.stringMatching(reason) });
    expect(await rejection(admin.status(2, soon()))).toMatchObject({ code: "adminQueue" });
    expect(reasons.length).toBe(1);
    admin.queue.onDead((error) => reasons.push(error.message));
    expect(reasons.length).toBe(2);
  });

  test("cannot be made of memory that shrinks", async () => {
    const { fake, admin } = await open();
    expect(fake.shrinkMemory(0)).toBe(false);
    expect(await admin.status(1, soon())).toBe("init");
  });

  test("a command that comes back twice", async () => {
    const { fake, admin } = await open();
    fake.answer = (command) => {
      if (command.vdevId === 1) fake.complete(command.head);
      return command.vdevId === 1 ? fake.honest(command) : "silence";
    };
    const other = admin.status(2, soon());
    await Promise.allSettled([admin.status(1, soon())]);
    expect(await rejection(other)).toMatchObject({ code: "adminQueue" });
  });

  test("is one that answers nothing any more", async () => {
    const { fake, admin } = await open({ timeouts: { lifeSign: 50 } });
    fake.answer = () => "silence";
    expect(await rejection(admin.status(1, soon(20)))).toMatchObject({ code: "io" });
    await until(() => admin.queue.state.kind === "dead");
    expect(deathOf(admin)).toMatch(/answers nothing any more/);
  });

  test("is not one that is slow with one command", async () => {
    const { fake, admin } = await open({ timeouts: { lifeSign: 1000 } });
    fake.answer = (command) => (command.name === "identity" ? fake.honest(command) : "silence");
    expect(await rejection(admin.status(1, soon(20)))).toMatchObject({ code: "io" });
    await until(() => fake.commands("identity").length === 2);
    await Bun.sleep(10);
    expect(admin.queue.state).toEqual({ kind: "ready" });
  });

  test("is one whose device asks for a reset, or is gone", async () => {
    const first = await open();
    first.fake.answer = () => "silence";
    first.fake.fn.status |= 0x40;
    expect(await rejection(first.admin.status(1, soon(20)))).toMatchObject({ code: "io" });
    await until(() => deathOf(first.admin) !== undefined);
    expect(deathOf(first.admin)).toMatch(/needsReset/);

    const second = await open();
    second.fake.answer = () => "silence";
    const waiting = second.admin.status(1, soon());
    second.fake.fn.lose(new Error("unplugged"));
    expect(await rejection(waiting)).toMatchObject({ code: "adminQueue", message: expect.stringMatching(/unplugged/) });
  });
});
