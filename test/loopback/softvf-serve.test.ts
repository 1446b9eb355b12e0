import { expect, test } from "bun:test";
import { Deadline } from "../../src/base/deadline.ts";
import type { SoftRequest } from "../../src/plugin.ts";
import { FeatureBit, featureBits, Status } from "../../src/virtio/features.ts";
import { RawAdmin } from "./softvf-admin.ts";
import { type SoftClass, TestDriver, TestVfs } from "./softvf-driver.ts";

/** A class that answers in TypeScript: what it reads, in capitals, when it is let. */
function shouting(): { readonly deviceClass: SoftClass; hold: Promise<void>; served: number } {
  const text = { read: new TextDecoder(), write: new TextEncoder() };
  const rig = {
    hold: Promise.resolve(),
    served: 0,
    deviceClass: {
      name: "shout",
      virtioId: 4,
      configSpace: {},
      features: { names: {} },
      queues: () => 1,
      softDevice: {
        pciClass: 0xff0000,
        options: {},
        create: () => ({
          features: 0n,
          queues: 2,
          worker: { name: "forward", parameters: {} },
          config: () => new Uint8Array(0),
          writeConfig: () => ({}),
          set: () => ({}),
          serve: async ({ readable }: SoftRequest) => {
            rig.served++;
            await rig.hold;
            const words = text.read.decode(readable);
            if (words === "bad") throw new Error("that is no word");
            return text.write.encode(words.toUpperCase());
          },
          [Symbol.dispose]: () => {},
        }),
      },
    } satisfies SoftClass,
  };
  return rig;
}

const FEATURES = featureBits(FeatureBit.version1, FeatureBit.ringEventIdx, FeatureBit.ringIndirectDesc);

async function ask(driver: TestDriver, words: string, room: number, queue = 0) {
  const request = driver.queues[queue]!.request([new TextEncoder().encode(words)], [room]);
  const { written, length } = await request;
  return new TextDecoder().decode(written[0]!.subarray(0, length));
}

test("a class serves its queues in TypeScript; what it throws fails the device until it is reset", async () => {
  const rig = shouting();
  await using vfs = await TestVfs.serveClass(rig.deviceClass, 1, async () => ({}));
  {
    await using driver = await TestDriver.start(vfs.vf(0), 2, FEATURES);
    const answers = Promise.all([ask(driver, "one", 99), ask(driver, "two", 99, 1), ask(driver, "three", 4)]);
    expect(await answers).toEqual(["ONE", "TWO", "THRE"]);
    expect(vfs.vf(0).fn.stats()).toMatchObject([
      { received: 2, completed: 2, bad: 0 },
      { received: 1, completed: 1, bad: 0 },
    ]);
    const told = driver.configInterrupt();
    ask(driver, "bad", 99).catch(() => {});
    await told;
    expect(vfs.vf(0).fn.virtio.status & Status.needsReset).toBe(Status.needsReset);
    expect(vfs.warnings.at(-1)).toContain("a request of queue 0 failed: that is no word");
  }
  await using driver = await TestDriver.start(vfs.vf(0), 2, FEATURES);
  expect(await ask(driver, "again", 99)).toBe("AGAIN");
});

test("a request of before a restore, which fails late, says nothing about the device that was restored", async () => {
  const rig = shouting();
  await using vfs = await TestVfs.serveClass(rig.deviceClass, 1, async () => ({}), { freeze: "list" });
  await using admin = await RawAdmin.open(vfs.physical);
  await using driver = await TestDriver.start(vfs.vf(0), 2, FEATURES);
  const { promise, reject } = Promise.withResolvers<void>();
  rig.hold = promise;
  const answer = ask(driver, "again", 99);
  await Deadline.after(5000, "the request").poll(() => rig.served === 1 || undefined, 1);
  rig.hold = Promise.resolve();
  await admin.steps(0, "quiesced", "freezed");
  expect(await admin.restore(0, await admin.save(0))).toBe(0);
  await admin.steps(0, "quiesced", "running");
  expect(await answer).toBe("AGAIN");
  reject(new Error("too late"));
  await Bun.sleep(1);
  expect(vfs.warnings.filter((text) => text.includes("too late"))).toEqual([]);
  expect(await ask(driver, "fresh", 99)).toBe("FRESH");
});

test("a quiesced device answers what it has taken; after a reset nobody waits for an answer", async () => {
  const rig = shouting();
  await using vfs = await TestVfs.serveClass(rig.deviceClass, 1, async () => ({}), { freeze: "list" });
  await using admin = await RawAdmin.open(vfs.physical);
  const { promise, resolve } = Promise.withResolvers<void>();
  const served = (requests: number) =>
    Deadline.after(5000, "the request").poll(() => rig.served === requests || undefined, 1);
  {
    await using driver = await TestDriver.start(vfs.vf(0), 2, FEATURES);
    rig.hold = promise;
    const answer = ask(driver, "later", 99);
    await served(1);
    await admin.steps(0, "quiesced");
    resolve();
    expect(await answer).toBe("LATER");
    await admin.steps(0, "running");
    const { promise: never, reject } = Promise.withResolvers<void>();
    rig.hold = never;
    ask(driver, "never", 99).catch(() => {});
    await served(2);
    await vfs.vf(0).fn.reset();
    reject(new Error("too late"));
    await Bun.sleep(1);
    expect(vfs.warnings.filter((text) => text.includes("too late"))).toEqual([]);
  }
  rig.hold = Promise.resolve();
  await using driver = await TestDriver.start(vfs.vf(0), 1, FEATURES);
  expect(await ask(driver, "fresh", 99)).toBe("FRESH");
});
