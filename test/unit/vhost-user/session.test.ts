import { describe, expect, test } from "bun:test";
import { VhostdError } from "../../../src/base/errors.ts";
import { drainEventfd, eventfd, fileInfo, memfd, signalEventfd } from "../../../src/native/sys.ts";
import type { DeviceClass } from "../../../src/plugin.ts";
import { BackendRequest, ProtocolFeature, Request, U64, VRING_AREA } from "../../../src/vhost-user/messages.ts";
import type { DeviceState, QueueState } from "../../../src/virtio/device-state.ts";
import { FeatureBit, featureBits, Status } from "../../../src/virtio/features.ts";
import { config, u64, withoutFd } from "../../kit/frontend/frontend.ts";
import { mockDeviceClass } from "../../kit/mock-target.ts";
import { connect, type Pair, REGIONS, startRunning } from "./harness.ts";

const offered = featureBits(
  0,
  50,
  FeatureBit.ringIndirectDesc,
  FeatureBit.ringEventIdx,
  FeatureBit.vhostUserProtocolFeatures,
  FeatureBit.version1,
);

describe("features", () => {
  test("the core masks: hidden, packed, platform and reset bits never reach the front-end, added ones do", async () => {
    await using pair = connect();
    expect(await pair.frontend.askU64(Request.GET_FEATURES)).toBe(offered);
  });

  test("bits that only the class knows are not acknowledged to the function", async () => {
    await using pair = connect();
    await startRunning(pair.frontend, 1);
    expect(pair.frontend.features).toBe(offered);
    expect(await pair.frontend.setFeatures(offered & ~featureBits(50))).toBe(0n);
    expect(pair.target.running?.features).toBe(offered & ~featureBits(50, FeatureBit.vhostUserProtocolFeatures));
  });

  test("what a class adds is its own matter, also where the function offers it", async () => {
    const features = offered | featureBits(50);
    await using pair = connect({ deviceFeatures: features & ~featureBits(FeatureBit.vhostUserProtocolFeatures) });
    await startRunning(pair.frontend, 1);
    expect(pair.target.running?.features).toBe(features & ~featureBits(50, FeatureBit.vhostUserProtocolFeatures));
  });

  test("protocol features: 0 3 5 9 10 13 15 16 and those of the class", async () => {
    const deviceClass = { ...mockDeviceClass, protocolFeatures: [4] };
    await using pair = connect({ deviceClass });
    expect(await pair.frontend.askU64(Request.GET_PROTOCOL_FEATURES)).toBe(featureBits(0, 3, 4, 5, 9, 10, 13, 15, 16));
  });
});

describe("rings of a running device", () => {
  test("disabling and enabling disconnects and connects the kick", async () => {
    await using pair = connect();
    const { frontend, target } = pair;
    await startRunning(frontend, 2);
    await frontend.enable(1, false);
    await frontend.enable(1, false);
    await frontend.enable(1, true);
    await frontend.enable(3, true);
    expect(target.calls.slice(4)).toEqual(["setKick 1 off", "setKick 1 on"]);
    expect(pair.session.status.rings[1]).toMatchObject({ started: true, enabled: true });
  });

  test("a disabled ring starts without its kick", async () => {
    await using pair = connect();
    const { frontend, target } = pair;
    await startRunning(frontend, 2);
    await frontend.stop({ order: "new" });
    await frontend.setFeatures();
    await frontend.setStatus(Status.featuresOk);
    for (const queue of frontend.queues) await frontend.setupQueue(queue);
    await frontend.enable(0, true);
    await frontend.setStatus(0xf);
    expect(target.eventfds.get(0)?.kick).toBeNumber();
    expect(target.eventfds.get(1)?.kick).toBeUndefined();
    expect(target.running?.queues.map(({ disabled }) => disabled)).toEqual([undefined, true]);
  });

  test("a function that does not take an enabled ring ends the session", async () => {
    await using pair = connect();
    const { frontend, target } = pair;
    await startRunning(frontend, 2);
    await frontend.enable(1, false);
    await frontend.stop({ order: "new" });
    frontend.enableAll = async () => void (await frontend.enable(0, true));
    await frontend.resumeQueues([0, 0]);
    target.before = (operation) => {
      if (operation === "enable") throw new VhostdError("io", "queue 1 is refused");
    };
    await frontend.enable(1, true).catch(() => {});
    expect((await pair.ended).reason).toBe("queue 1 is refused");
    expect(target.running).toBeUndefined();
  });

  test("changed call and kick are routed anew without a stop", async () => {
    await using pair = connect();
    const { frontend, target } = pair;
    await startRunning(frontend, 1);
    using call = eventfd();
    using kick = eventfd();
    expect(await frontend.command(Request.SET_VRING_CALL, u64(0n), [call.number])).toBe(0n);
    expect(await frontend.command(Request.SET_VRING_KICK, u64(0n), [kick.number])).toBe(0n);
    expect(await frontend.command(Request.SET_VRING_CALL, withoutFd(0))).toBe(0n);
    expect(await frontend.command(Request.SET_VRING_ERR, u64(0n), [call.number])).toBe(0n);
    expect(target.calls.slice(4)).toEqual(["setCall 0 on", "setKick 0 on", "setCall 0 off"]);
    expect(target.running).toBeDefined();
  });

  test("a polled ring starts with a kick that nobody rings", async () => {
    await using pair = connect();
    const { frontend, target } = pair;
    await startRunning(frontend, 1);
    await frontend.stop({ order: "new" });
    const [queue] = frontend.queues;
    await frontend.setupQueue(queue!);
    await frontend.command(Request.SET_VRING_KICK, withoutFd(0));
    await frontend.enable(0, true);
    await frontend.setStatus(0xf);
    expect(target.running?.queues).toHaveLength(1);
    const kick = target.eventfds.get(0)?.kick;
    expect(kick).toBeDefined();
    signalEventfd(queue!.kick.number);
    expect(drainEventfd(kick!)).toBe(0);
  });
});

describe("where a ring goes on", () => {
  /** Starts ring 0, 64 entries, at `base` with this used index in the guest's memory. */
  async function startAt({ frontend, target }: Pair, base: number, used: number): Promise<QueueState> {
    await startRunning(frontend, 1);
    await frontend.stop({ order: "new" });
    frontend.memory.write(frontend.queues[0]!.driver.ring.device + 2, Uint8Array.of(used & 0xff, used >> 8));
    await frontend.resumeQueues([base]);
    return target.running!.queues[0]!;
  }

  test("what was given back after the front-end had noted its base is not taken again", async () => {
    await using pair = connect();
    expect(await startAt(pair, 65530, 4)).toMatchObject({ lastAvail: 4, lastUsed: 4 });
  });

  test("a base ahead of the used index, or behind by more than the ring's length, stays as it was said", async () => {
    await using ahead = connect();
    expect(await startAt(ahead, 7, 4)).toMatchObject({ lastAvail: 7, lastUsed: 4 });
    await using behind = connect();
    expect(await startAt(behind, 0, 65)).toMatchObject({ lastAvail: 0, lastUsed: 65 });
  });

  test("what the device keeps while another ring joins goes back to it, once", async () => {
    await using pair = connect({ quietPeriod: 5 });
    const { frontend, target } = pair;
    await startRunning(frontend, 2);
    const late = frontend.queues[1]!;
    await frontend.stop({ order: "new" });
    frontend.queues.pop();
    await frontend.resumeQueues([0]);
    frontend.queues.push(late);
    target.keeps.set(0, [5, 9]);
    const restarted = Promise.withResolvers<void>();
    target.onStart = restarted.resolve;
    await frontend.setupQueue(late, 0);
    await restarted.promise;
    const given = () => target.running?.queues.map(({ inFlight }) => inFlight);
    expect(given()).toEqual([[5, 9], undefined]);
    target.keeps.clear();
    await frontend.stop({ order: "new" });
    await frontend.resumeQueues([0, 0]);
    expect(given()).toEqual([undefined, undefined]);
  });

  test("a ring that was disabled just before another joins gives back first what it has taken", async () => {
    await using pair = connect({ quietPeriod: 5 });
    const { frontend, target } = pair;
    await startRunning(frontend, 2);
    const late = frontend.queues[1]!;
    await frontend.stop({ order: "new" });
    frontend.queues.pop();
    await frontend.resumeQueues([0]);
    frontend.queues.push(late);
    target.keeps.set(0, [5, 9]);
    const [restarted, disabled] = [Promise.withResolvers<DeviceState>(), Promise.withResolvers<void>()];
    target.onStart = () => restarted.resolve(target.running!);
    target.before = (operation) => void (operation === "enable" && disabled.resolve());
    await frontend.enable(0, false);
    await frontend.setupQueue(late, 0);
    const [first, second] = (await restarted.promise).queues;
    expect([first?.disabled, first?.inFlight, second?.disabled]).toEqual([undefined, [5, 9], undefined]);
    expect(target.eventfds.get(0)?.kick).toBeUndefined();
    await disabled.promise;
    expect(target.calls.at(-1)).toBe("enable 1");
  });
});

describe("configuration space", () => {
  test("GET_CONFIG: zeros beyond the function's own, an error beyond the class's", async () => {
    await using pair = connect();
    const { frontend } = pair;
    await frontend.negotiate();
    expect(await frontend.getConfig(8, 5)).toEqual(Uint8Array.of(9, 10, 0, 0, 0));
    expect(await frontend.getConfig(8, 6)).toBeUndefined();
    const garbage = await frontend.ask(Request.GET_CONFIG, config(8, new Uint8Array(5).fill(0xff)));
    expect(garbage.subarray(12)).toEqual(Uint8Array.of(9, 10, 0, 0, 0));
    expect(await frontend.getConfig(0, 0)).toEqual(new Uint8Array());
    expect(await frontend.getConfig(0xffff_ffff, 1)).toBeUndefined();
  });

  test("SET_CONFIG writes writable fields only; a migration's other fields are ignored", async () => {
    await using pair = connect();
    const { frontend, target } = pair;
    await frontend.negotiate();
    expect(await frontend.setConfig(12, Uint8Array.of(7))).toBe(0n);
    expect(await frontend.setConfig(8, Uint8Array.of(1, 2, 3, 4, 5))).toBe(1n);
    expect(await frontend.setConfig(0, new Uint8Array(13).fill(9), 1)).toBe(0n);
    expect(await frontend.setConfig(0, new Uint8Array(8), 1)).toBe(0n);
    expect(target.calls).toEqual(["writeConfig 12 07", "writeConfig 12 09"]);
    expect(pair.lines.at(-1)).toContain("SET_CONFIG of 5 bytes at 8 reaches beyond the writable fields (mode 12..12)");
  });

  test("a change is told on the back-end's channel, and no reply is asked for", async () => {
    await using pair = connect();
    const { frontend, target } = pair;
    await frontend.negotiate();
    const requests = frontend.backendRequests!;
    target.changeConfig(Uint8Array.of(1));
    await requests.wait(1);
    target.changeConfig(Uint8Array.of(9));
    await requests.wait(2);
    expect(requests.received).toMatchObject([
      { request: 2, flags: 1 },
      { request: 2, flags: 1 },
    ]);
    expect(await frontend.getConfig(0, 1)).toEqual(Uint8Array.of(9));
  });

  test("a front-end hears of changes where it has negotiated CONFIG and opened the channel", async () => {
    await using pair = connect();
    const { frontend, session } = pair;
    await frontend.negotiate({ protocolFeatures: ~featureBits(ProtocolFeature.BACKEND_REQ) });
    expect([frontend.has(ProtocolFeature.CONFIG), session.hearsOfChanges]).toEqual([true, false]);
    await frontend.negotiate({ protocolFeatures: ~featureBits(ProtocolFeature.CONFIG) });
    expect(session.hearsOfChanges).toBe(false);
    await frontend.negotiate();
    expect(session.hearsOfChanges).toBe(true);
    expect(session.peer).toBe(process.pid);
  });

  test("a channel that is gone disturbs nothing", async () => {
    await using pair = connect();
    const { frontend, target } = pair;
    await frontend.negotiate();
    frontend.backendRequests?.[Symbol.dispose]();
    target.changeConfig(Uint8Array.of(1));
    expect(await frontend.getConfig(0, 1)).toEqual(Uint8Array.of(1));
    await frontend.openBackendChannel();
    target.changeConfig(Uint8Array.of(2));
    await frontend.backendRequests!.wait(1);
  });

  test("a device that fails shows NEEDS_RESET until the front-end resets it", async () => {
    await using pair = connect();
    const { frontend, session } = pair;
    await startRunning(frontend, 1);
    session.needsReset("a ring is malformed");
    expect(await frontend.askU64(Request.GET_STATUS)).toBe(BigInt(0xf | Status.needsReset));
    await frontend.backendRequests!.wait(1);
    await frontend.setStatus(0);
    expect(await frontend.askU64(Request.GET_STATUS)).toBe(0n);
  });
});

test("VRING_HOST_NOTIFIER_MSG carries queue, place and fd of each doorbell", async () => {
  using doorbell = memfd("doorbell", 8192);
  await using pair = connect({
    doorbellShare: async (queue) => (queue === 1 ? { fd: doorbell.number, offset: 4096, size: 4096 } : undefined),
  });
  const { frontend } = pair;
  await startRunning(frontend, 2);
  expect(frontend.has(ProtocolFeature.HOST_NOTIFIER)).toBe(true);
  await frontend.backendRequests!.wait(1);
  const [message] = frontend.backendRequests!.received;
  expect(message?.request).toBe(3);
  expect(VRING_AREA.read(message!.payload)).toEqual({ queue: 1n, size: 4096, offset: 4096 });
  expect(fileInfo(message!.fds[0]!.number).ino).toBe(fileInfo(doorbell.number).ino);
});

test("doorbells are given again after each start", async () => {
  using doorbell = memfd("doorbell", 4096);
  await using pair = connect({ doorbellShare: async () => ({ fd: doorbell.number, offset: 0, size: 4096 }) });
  const { frontend } = pair;
  await frontend.negotiate();
  await frontend.setupMemory(REGIONS);
  await frontend.startQueues(2, { size: 64 });
  await frontend.backendRequests!.wait(2);
  const bases = await frontend.stop({ order: "new" });
  await frontend.resumeQueues(bases);
  await frontend.backendRequests!.wait(4);
  const doorbells = frontend.backendRequests!.received.map(({ request, payload }) => [request, payload[0]]);
  expect(doorbells).toEqual([0, 1, 0, 1].map((queue) => [BackendRequest.VRING_HOST_NOTIFIER_MSG, queue]));
  expect(pair.lines.filter((line) => line.includes("could not be told"))).toEqual([]);
});

test("nothing is given to a front-end that has not negotiated it", async () => {
  using doorbell = memfd("doorbell", 4096);
  let asked = 0;
  await using pair = connect({
    doorbellShare: async () => {
      asked++;
      return { fd: doorbell.number, offset: 0, size: 4096 };
    },
  });
  const { frontend } = pair;
  const { HOST_NOTIFIER } = ProtocolFeature;
  await frontend.negotiate({ protocolFeatures: ~featureBits(HOST_NOTIFIER) });
  await frontend.setupMemory(REGIONS);
  await frontend.startQueues(1, { size: 64 });
  expect(frontend.has(HOST_NOTIFIER)).toBe(false);
  expect(asked).toBe(0);
});

describe("replies and records", () => {
  test("the record is written before the answer, and not for questions", async () => {
    await using pair = connect();
    const { frontend, target } = pair;
    await frontend.negotiate();
    await frontend.setupMemory(REGIONS);
    const before = target.checkpoints;
    await frontend.askU64(Request.GET_STATUS);
    await frontend.getConfig(0, 1);
    expect(target.checkpoints).toBe(before);
    expect(await frontend.enable(2, true)).toBe(0n);
    expect(target.checkpoints).toBe(before + 1);
    expect(await frontend.getBase(2)).toBe(0);
    expect(target.checkpoints).toBe(before + 2);
  });

  test("RESET_OWNER disables the rings", async () => {
    await using pair = connect();
    await startRunning(pair.frontend, 1);
    expect(await pair.frontend.command(Request.RESET_OWNER)).toBe(0n);
    expect(pair.target.calls.at(-1)).toBe("setKick 0 off");
  });

  test("messages of a class add to the table and pass its checks", async () => {
    const messages: DeviceClass["messages"] = {
      20: { name: "NET_SET_MTU", size: 8, needs: 4, handle: async (payload) => refuseBig(payload) },
      [Request.GET_QUEUE_NUM]: { name: "GET_QUEUE_NUM", size: 0, handle: async () => u64(2n) },
      60: { name: "SET_STEERING", size: 0, fds: 1, handle: async (_payload, _device, fds) => noteFd(fds) },
    };
    const kinds: string[] = [];
    const noteFd = (fds: readonly number[]) => void kinds.push(...fds.map((fd) => fileInfo(fd).kind));
    await using pair = connect({ deviceClass: { ...mockDeviceClass, protocolFeatures: [4], messages } });
    const { frontend } = pair;
    await frontend.negotiate();
    expect(await frontend.askU64(Request.GET_QUEUE_NUM)).toBe(2n);
    expect(await frontend.command(20, u64(1500n))).toBe(0n);
    expect(await frontend.command(20, u64(99_999n))).toBe(1n);
    expect(pair.lines.at(-1)).toContain("NET_SET_MTU was refused: MTU 99999");
    using fd = eventfd();
    expect(await frontend.command(60, new Uint8Array(), [fd.number])).toBe(0n);
    expect(kinds).toEqual(["eventfd"]);
    await frontend.send(60, new Uint8Array(), [fd.number, fd.number]);
    expect((await pair.ended).reason).toContain("SET_STEERING (60) has 2 fds, must be 1");
  });

  test("what a class refuses again and again is not logged without end, nor recorded", async () => {
    const messages: DeviceClass["messages"] = {
      60: { name: "SET_STEERING", size: 0, handle: async () => await Promise.reject(new Error("no steering")) },
    };
    await using pair = connect({ deviceClass: { ...mockDeviceClass, messages } });
    await pair.frontend.negotiate();
    const before = pair.target.checkpoints;
    for (let times = 0; times < 100; times++) expect(await pair.frontend.command(60)).toBe(1n);
    expect(pair.target.checkpoints - before).toBeLessThan(5);
    const lines = pair.lines.filter((line) => line.includes("no steering"));
    expect(lines.length).toBeLessThan(50);
    expect(lines.at(-1)).toContain("no more such lines");
  });

  test("a class's handler that does not end ends the session", async () => {
    const messages: DeviceClass["messages"] = {
      60: { name: "SET_STEERING", size: 0, handle: () => new Promise(() => {}) },
    };
    await using pair = connect({ deviceClass: { ...mockDeviceClass, messages }, handlerTimeout: 20 });
    await pair.frontend.negotiate();
    await pair.frontend.send(60);
    expect((await pair.ended).reason).toContain("the handler of SET_STEERING did not end within 20 ms");
  });

  test("a class says how its queues are counted", async () => {
    await using pair = connect({ deviceClass: { ...mockDeviceClass, countedQueues: (queues) => queues / 2 } });
    await pair.frontend.negotiate();
    expect(await pair.frontend.askU64(Request.GET_QUEUE_NUM)).toBe(2n);
  });

  test("a class's message of another size ends the session", async () => {
    const messages: DeviceClass["messages"] = { 20: { name: "NET_SET_MTU", size: 8, handle: async () => undefined } };
    await using pair = connect({ deviceClass: { ...mockDeviceClass, messages } });
    await pair.frontend.send(20, new Uint8Array(4));
    expect((await pair.ended).reason).toContain("must be 8");
  });
});

test("a device that does not start ends the session with its reason", async () => {
  await using pair = connect();
  pair.target.before = (operation) => {
    if (operation === "start") throw new VhostdError("notSupported", "base 7 cannot be resumed");
  };
  await startRunning(pair.frontend, 1).catch(() => {});
  expect((await pair.ended).reason).toBe("base 7 cannot be resumed");
  expect(pair.target.mapped).toEqual([]);
});

test("an eventfd that comes with a set-up that fails is closed", async () => {
  await using pair = connect();
  const { frontend, target } = pair;
  await startRunning(frontend, 1);
  await frontend.send(Request.SET_STATUS, u64(0n));
  target.before = (operation) => {
    if (operation === "reset") throw new VhostdError("resetTimedOut", "status stays 4");
  };
  using kick = eventfd();
  await frontend.send(Request.SET_VRING_KICK, u64(0n), [kick.number]);
  expect((await pair.ended).reason).toBe("status stays 4");
});

test("close ends the session from our side, after the operation under way", async () => {
  await using pair = connect();
  const { frontend, target, session } = pair;
  const gate = Promise.withResolvers<void>();
  const entered = Promise.withResolvers<void>();
  target.before = async (operation) => {
    if (operation !== "start") return;
    entered.resolve();
    await gate.promise;
  };
  const starting = startRunning(frontend, 1).catch(() => {});
  await entered.promise;
  session.close("the VF is removed");
  await Bun.sleep(5);
  expect(target.calls).not.toContain("release");
  gate.resolve();
  expect(await pair.ended).toEqual({ reason: "the VF is removed" });
  expect(target.running).toBeUndefined();
  await starting;
});

function refuseBig(payload: Uint8Array): undefined {
  const { value } = U64.read(payload);
  if (value > 65_535n) throw new Error(`MTU ${value} exceeds 65535`);
  return undefined;
}
