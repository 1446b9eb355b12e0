import { describe, expect, test } from "bun:test";
import { eventfd } from "../../../src/native/sys.ts";
import { FLAG_NEED_REPLY, ProtocolFeature, Request, U64, VRING_STATE } from "../../../src/vhost-user/messages.ts";
import { FeatureBit, featureBits, Status } from "../../../src/virtio/features.ts";
import { u64, type VhostUserFrontend } from "../../kit/frontend/frontend.ts";
import { connect, type Pair, REGIONS, startRunning } from "./harness.ts";

/** The order of messages that real front-ends were seen to send. */

const MAPPED = ["map 0x0+0xa0000", "map 0xc0000+0x100000", "map 0x100000000+0x800000"];
const SHORT = 5;
const withoutStatus = ~featureBits(ProtocolFeature.STATUS);

/** Makes buffers available that the mock device counts as taken when it stops. */
function submit(frontend: VhostUserFrontend, queue: number, count: number): void {
  for (let n = 0; n < count; n++) frontend.queues[queue]!.driver.ring.submit([new Uint8Array(1)], []);
}

describe("block front-end, QEMU 7.2", () => {
  test("connect: 1 15 16 17 36 21 3 1, {13 14} per queue, 24", async () => {
    await using pair = connect();
    const { frontend, target } = pair;
    await frontend.negotiate();
    await startCallsAndErrors(frontend, 4);
    expect(await frontend.getConfig(0, 13)).toEqual(Uint8Array.of(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0, 0, 0));
    expect(target.calls).toEqual([]);
    expect(pair.session.status.state).toBe("connected");
  });

  test("start, stop by 39(0) first, cont at the same indices", async () => {
    await using pair = connect();
    const { frontend, target } = pair;
    await frontend.negotiate();
    await frontend.setupMemory(REGIONS);
    await frontend.startQueues(2, { size: 64 });
    expect(target.calls).toEqual([...MAPPED, "start 0@0 1@0"]);
    expect(target.running?.features).toBe(
      featureBits(0, FeatureBit.ringIndirectDesc, FeatureBit.ringEventIdx, FeatureBit.version1),
    );
    const [first] = target.running!.queues;
    expect(first).toMatchObject({ index: 0, size: 64, vector: 1, desc: 0x1_0000_0000, lastAvail: 0, lastUsed: 0 });
    expect(target.eventfds.get(1)?.kick).toBeNumber();

    submit(frontend, 0, 5);
    submit(frontend, 1, 9);
    await frontend.setStatus(0);
    expect(await frontend.askU64(Request.GET_STATUS)).toBe(0n);
    expect(target.running).toBeDefined();
    const bases = await frontend.stop({ order: "old" });
    expect(bases).toEqual([5, 9]);
    expect(target.calls.slice(4)).toEqual(["setKick 0 off", "setKick 1 off", "stop"]);
    expect(pair.session.status.state).toBe("stopped");

    await frontend.resumeQueues(bases);
    expect(target.calls.at(-1)).toBe("start 0@5 1@9");
  });

  test("the guest reboots and uses fewer queues", async () => {
    await using pair = connect();
    const { frontend, target } = pair;
    await startRunning(frontend, 3);
    await frontend.stop({ order: "old" });
    await frontend.startQueues(1, { size: 32 });
    expect(target.calls.at(-1)).toBe("start 0@0");
    expect(pair.session.status.rings.map((ring) => ring.started)).toEqual([true, false, false]);
  });

  test("migration: log base, LOG_ALL and 9 on running rings are no new set-up", async () => {
    await using pair = connect();
    const { frontend, target } = pair;
    await startRunning(frontend, 1);
    const before = target.calls.length;
    expect(await frontend.command(Request.SET_LOG_BASE, new Uint8Array(16))).toBe(0n);
    expect(await frontend.setFeatures()).toBe(0n);
    expect(await frontend.setAddresses(frontend.queues[0]!, { log: true })).toBe(0n);
    expect(target.calls).toHaveLength(before);
  });
});

describe("newer QEMU", () => {
  test("stop by 11 first, then 39(0); a reset by 34; start anew", async () => {
    await using pair = connect();
    const { frontend, target } = pair;
    await startRunning(frontend, 2);
    submit(frontend, 1, 3);
    expect(await frontend.stop({ order: "new" })).toEqual([0, 3]);
    expect(target.calls.at(-1)).toBe("stop");
    expect(await frontend.command(Request.RESET_DEVICE)).toBe(0n);
    expect(target.calls.at(-1)).toBe("reset");
    await frontend.startQueues(2, { size: 64 });
    expect(target.calls.at(-1)).toBe("start 0@0 1@0");
    expect(target.eventfds.get(0)?.kick).toBeNumber();
  });

  test("11 in the middle of the old rings does not start anything again", async () => {
    await using pair = connect({ quietPeriod: SHORT });
    const { frontend, target } = pair;
    await startRunning(frontend, 3);
    await frontend.getBase(1);
    await Bun.sleep(5 * SHORT);
    expect(await frontend.getBase(0)).toBe(0);
    expect(target.calls.filter((call) => call.startsWith("start"))).toHaveLength(1);
  });
});

describe("net front-end", () => {
  test("connect messages once per pair, 18 before features and memory, one pair set up", async () => {
    await using pair = connect();
    const { frontend, target } = pair;
    await frontend.negotiate();
    await frontend.negotiate();
    for (const ring of [0, 1, 0, 1]) await frontend.enable(ring, true);
    for (const ring of [2, 3]) await frontend.enable(ring, false);
    await frontend.setupMemory(REGIONS);
    await frontend.startQueues(2, { size: 64 });
    expect(target.calls.at(-1)).toBe("start 0@0 1@0");
    expect(target.running?.queues.every(({ disabled }) => disabled === undefined)).toBe(true);
    expect(await frontend.stop({ order: "old" })).toEqual([0, 0]);
  });

  /** All four pairs of the guest are set up, one after the other, as its driver made them; one of them is in use. */
  async function startFourPairs({ frontend }: Pair): Promise<void> {
    for (let ring = 0; ring < 4; ring += 2) await frontend.negotiate();
    for (let ring = 0; ring < 4; ring++) await frontend.enable(ring, ring < 2);
    await frontend.setupMemory(REGIONS);
    frontend.enableAll = async () => {};
    await frontend.startQueues(4, { size: 64 });
  }

  test("rings that are set up and not enabled are configured as such, and enabled without a stop", async () => {
    await using pair = connect();
    const { frontend, target } = pair;
    const disabled = () => target.running?.queues.map((queue) => queue.disabled ?? false);
    const kicks = () => frontend.queues.map(({ index }) => target.eventfds.get(index)?.kick !== undefined);
    await startFourPairs(pair);
    expect(target.calls.slice(3)).toEqual(["start 0@0 1@0 2@0 3@0"]);
    expect(disabled()).toEqual([false, false, true, true]);
    expect(kicks()).toEqual([true, true, false, false]);
    // ethtool -L: each command is in force when it is answered.
    expect(await frontend.enable(2, true)).toBe(0n);
    expect(disabled()).toEqual([false, false, false, true]);
    expect(await frontend.enable(3, true)).toBe(0n);
    expect(await frontend.enable(3, true)).toBe(0n);
    expect(kicks()).toEqual([true, true, true, true]);
    expect(target.calls.slice(4)).toEqual(["enable 0 1 2", "enable 0 1 2 3"]);
    for (const { index } of frontend.queues) expect(await frontend.getBase(index)).toBe(0);
    expect(target.calls.slice(6)).toEqual(["stop"]);
  });

  test("rings that are disabled lose their kicks at once; the function learns of them in a quiet moment, once", async () => {
    await using pair = connect({ quietPeriod: 20 * SHORT });
    const { frontend, target } = pair;
    await startFourPairs(pair);
    await frontend.enable(2, true);
    await frontend.enable(3, true);
    const before = target.calls.length;
    const learned = Promise.withResolvers<void>();
    target.before = (operation) => void (operation === "enable" && learned.resolve());
    for (const ring of [2, 3]) await frontend.enable(ring, false);
    expect(target.calls.slice(before)).toEqual(["setKick 2 off", "setKick 3 off"]);
    const { checkpoints } = target;
    await learned.promise;
    await frontend.askU64(Request.GET_STATUS);
    expect(target.calls.slice(before + 2)).toEqual(["enable 0 1"]);
    expect(target.checkpoints).toBe(checkpoints + 1);
    expect(target.running?.queues.map((queue) => queue.disabled ?? false)).toEqual([false, false, true, true]);
  });

  test("a ring that is enabled again before the function has learned of it only gets its kick back", async () => {
    await using pair = connect();
    const { frontend, target } = pair;
    await startFourPairs(pair);
    const before = target.calls.length;
    await frontend.enable(1, false);
    await frontend.enable(1, true);
    expect(target.calls.slice(before)).toEqual(["setKick 1 off", "setKick 1 on"]);
    // What is pending goes along with what cannot wait.
    await frontend.enable(1, false);
    await frontend.enable(2, true);
    expect(target.calls.slice(before + 2)).toEqual(["setKick 1 off", "enable 0 2"]);
  });

  test("a kick that comes for a disabled ring reaches nobody before the ring is enabled", async () => {
    await using pair = connect();
    const { frontend, target } = pair;
    await startFourPairs(pair);
    using kick = eventfd();
    await frontend.command(Request.SET_VRING_KICK, u64(2n), [kick.number]);
    expect(target.eventfds.get(2)?.kick).toBeUndefined();
    await frontend.enable(2, true);
    expect(target.eventfds.get(2)?.kick).toBeNumber();
  });

  test("a front-end that disables every ring is about to stop: that costs no change of the function", async () => {
    await using pair = connect({ quietPeriod: SHORT });
    const { frontend, target } = pair;
    await startRunning(frontend, 2);
    await frontend.enable(0, false);
    await frontend.enable(1, false);
    await Bun.sleep(5 * SHORT);
    expect(target.calls.filter((call) => call.startsWith("enable"))).toEqual([]);
  });
});

describe("virtio-user of DPDK", () => {
  test("bits 0 3 16, queue order 0 2 1 3, gpa == user address, reply to 39, no 39(0) at stop", async () => {
    await using pair = connect();
    const { frontend, target } = pair;
    const { MQ, REPLY_ACK, STATUS } = ProtocolFeature;
    await frontend.negotiate({ protocolFeatures: featureBits(MQ, REPLY_ACK, STATUS) });
    await frontend.setupMemory(REGIONS.slice(2));
    await frontend.startQueues(4, { size: 64 });
    await frontend.stop({ order: "old" });
    await frontend.setStatus(Status.featuresOk);
    for (const index of [0, 2, 1, 3]) await frontend.setupQueue(frontend.queues[index]!);
    for (const index of [0, 2, 1, 3]) await frontend.enable(index, true);
    await frontend.channel.send(Request.SET_STATUS, u64(0xfn), [], FLAG_NEED_REPLY);
    expect(U64.read((await frontend.channel.receive())!.payload).value).toBe(0n);
    expect(target.calls.at(-1)).toBe("start 0@0 1@0 2@0 3@0");
    for (const { index } of frontend.queues) await frontend.getBase(index);
    expect(pair.session.status.state).toBe("stopped");
  });
});

describe("a front-end without STATUS", () => {
  test("runs when every ring that was set up is started and one is enabled", async () => {
    await using pair = connect({ quietPeriod: SHORT });
    const { frontend, target } = pair;
    await frontend.negotiate({ protocolFeatures: withoutStatus });
    await frontend.setupMemory(REGIONS);
    frontend.enableAll = async () => {};
    await frontend.startQueues(2, { size: 64 });
    const started = Promise.withResolvers<void>();
    target.onStart = started.resolve;
    await Bun.sleep(5 * SHORT);
    expect(target.running).toBeUndefined();
    await frontend.enable(0, true);
    await started.promise;
    await frontend.enable(1, true);
    expect(target.calls.slice(3)).toEqual(["start 0@0 1@0", "enable 0 1"]);
    expect(await frontend.stop({ order: "old" })).toEqual([0, 0]);
  });

  test("fewer rings than before are waited for after a stop", async () => {
    await using pair = connect({ quietPeriod: SHORT });
    const { frontend, target } = pair;
    let started = Promise.withResolvers<void>();
    target.onStart = () => started.resolve();
    await frontend.negotiate({ protocolFeatures: withoutStatus });
    await frontend.setupMemory(REGIONS);
    await frontend.startQueues(2, { size: 64 });
    await started.promise;
    await frontend.stop({ order: "old" });
    started = Promise.withResolvers<void>();
    await frontend.startQueues(1, { size: 64 });
    await started.promise;
    expect(target.calls.at(-1)).toBe("start 0@0");
  });

  test("a message that comes during the start waits for it", async () => {
    await using pair = connect({ quietPeriod: SHORT });
    const { frontend, target } = pair;
    const entered = Promise.withResolvers<void>();
    const gate = Promise.withResolvers<void>();
    target.before = async (operation) => {
      if (operation !== "start") return;
      entered.resolve();
      await gate.promise;
    };
    await frontend.negotiate({ protocolFeatures: withoutStatus });
    await frontend.setupMemory(REGIONS);
    await frontend.startQueues(1, { size: 64 });
    await entered.promise;
    const base = frontend.getBase(0);
    await Bun.sleep(SHORT);
    gate.resolve();
    expect(await base).toBe(0);
    expect(target.calls.slice(-2)).toEqual(["start 0@0", "stop"]);
  });

  test("rings are enabled from the start where bit 30 is not acknowledged", async () => {
    await using pair = connect({ quietPeriod: SHORT });
    const { frontend, target } = pair;
    await frontend.negotiate({
      protocolFeatures: withoutStatus,
      features: ~featureBits(FeatureBit.vhostUserProtocolFeatures),
    });
    await frontend.setupMemory(REGIONS);
    const started = Promise.withResolvers<void>();
    target.onStart = started.resolve;
    await frontend.startQueues(1, { size: 64 });
    await started.promise;
    expect(target.eventfds.get(0)?.kick).toBeNumber();
  });

  test("a ring that comes late joins those that run", async () => {
    await using pair = connect({ quietPeriod: SHORT });
    const { frontend, target } = pair;
    await startRunning(frontend, 2);
    submit(frontend, 0, 4);
    const late = frontend.queues[1]!;
    await frontend.stop({ order: "new" });
    frontend.queues.pop();
    await frontend.resumeQueues([4]);
    frontend.queues.push(late);
    const restarted = Promise.withResolvers<void>();
    target.onStart = restarted.resolve;
    await frontend.setupQueue(late, 0);
    await restarted.promise;
    expect(target.calls.slice(-2)).toEqual(["stop listed", "start 0@4 1@0"]);
  });
});

describe("39(0) without any 11: the old run is reset by", () => {
  const first: Record<string, (frontend: VhostUserFrontend) => Promise<unknown>> = {
    SET_FEATURES: (frontend) => frontend.setFeatures(),
    SET_STATUS: (frontend) => frontend.setStatus(Status.featuresOk),
    SET_VRING_NUM: (frontend) => frontend.command(Request.SET_VRING_NUM, VRING_STATE.encode({ index: 0, num: 16 })),
    SET_VRING_BASE: (frontend) => frontend.command(Request.SET_VRING_BASE, VRING_STATE.encode({ index: 0, num: 5 })),
    SET_VRING_ADDR: (frontend) => frontend.setAddresses(frontend.queues[1]!),
    SET_VRING_KICK: (frontend) => frontend.command(Request.SET_VRING_KICK, u64(0n), [frontend.queues[0]!.kick.number]),
  };
  for (const [name, message] of Object.entries(first)) {
    test(name, async () => {
      await using pair = connect();
      const { frontend, target } = pair;
      await startRunning(frontend, 2);
      await frontend.setStatus(0);
      expect(target.running).toBeDefined();
      await message(frontend);
      expect(target.calls.at(-1)).toBe("reset");
      await frontend.startQueues(1, { size: 32 });
      expect(target.calls.at(-1)).toBe("start 0@0");
    });
  }
});

test("11 for a ring that was never set up answers its base and stops nothing", async () => {
  await using pair = connect();
  const { frontend, target } = pair;
  await startRunning(frontend, 1);
  await frontend.command(Request.SET_VRING_BASE, VRING_STATE.encode({ index: 3, num: 17 }));
  expect(await frontend.getBase(3)).toBe(17);
  expect(target.running).toBeDefined();
});

async function startCallsAndErrors(frontend: VhostUserFrontend, queues: number): Promise<void> {
  for (let index = 0; index < queues; index++) {
    for (const request of [Request.SET_VRING_CALL, Request.SET_VRING_ERR]) {
      await frontend.command(request, u64(BigInt(index) | 0x100n));
    }
  }
}
