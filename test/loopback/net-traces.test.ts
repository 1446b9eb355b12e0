import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { FLAG_NEED_REPLY, ProtocolFeature, Request, U64 } from "../../src/vhost-user/messages.ts";
import { featureBits, Status } from "../../src/virtio/features.ts";
import { u64, type VhostUserFrontend, withoutFd } from "../kit/frontend/frontend.ts";
import { GuestMemoryFile } from "../kit/guest-memory-file.ts";
import { MOVERS } from "../kit/movers.ts";
import { NetFeature, type NetFrontend } from "../kit/net/net-frontend.ts";
import { NetGuest } from "../kit/net/net-guest.ts";
import { macOfVf, NetLab } from "../kit/net/net-lab.ts";
import { COMPLETE } from "../kit/net/streams.ts";

/** What real front-ends were seen to send for a network device, in their order, against the daemon and a guest behind a wire. */

const { MQ, REPLY_ACK, STATUS, CONFIG } = ProtocolFeature;
/** virtio-user's guest memory is its own address space. */
const USER_BASE = 0x1_0000_0000;
const { featuresOk, acknowledge, driver, driverOk } = Status;

describe.each(MOVERS)("moved by $mover", ({ migration }) => {
  let lab: NetLab;
  beforeAll(async () => {
    lab = await NetLab.create({ migration });
  }, 30_000);
  afterAll(async () => {
    await lab?.[Symbol.asyncDispose]();
  });

  for (const pairs of [1, 4]) {
    test(`QEMU 7.2, queues: ${pairs}: connect, start, ethtool -L, stop and cont, reset, start again`, async () => {
      await lab.idle(0, 1);
      using there = await lab.boot(1, { pairs });
      // It never negotiates CONFIG for a network device.
      const frontend = lab.dial(0, { pairs, enabled: 1, protocolFeatures: ~featureBits(CONFIG) });
      frontend.replies = "as QEMU";
      using here = await NetGuest.boot(frontend, { mac: macOfVf(0) });
      await lab.daemon.running();
      await exchange(here, there);
      if (pairs > 1) {
        await frontend.useOnly(pairs);
        await exchange(here, there);
        await frontend.useOnly(2);
      }
      const bases = await frontend.stop({ order: "old" });
      expect(await frontend.askU64(Request.GET_STATUS)).toBe(0n);
      await frontend.resumeQueues(bases);
      await exchange(here, there);
      await frontend.resumeQueues(await frontend.stop({ order: "new" }));
      await exchange(here, there);
      // The guest reboots: its driver gives up the old rings.
      await frontend.stop({ order: "old" });
      await frontend.startQueues(2, { size: 256, bufferSpace: 512 << 10 });
      await lab.daemon.running();
      expect(lab.info(0).reason).toBeNull();
    }, 30_000);
  }

  test("virtio-user of DPDK: memory as a table, rings 0 2 1 3, no status at its stop, and the same again", async () => {
    await lab.idle(0, 1);
    using there = await lab.boot(1, { pairs: 2 });
    const frontend = lab.dial(0, { pairs: 2 });
    using _frontend = frontend;
    const file = new GuestMemoryFile(USER_BASE, 8 << 20);
    frontend.memory.regions.push({ file, userAddress: USER_BASE });
    await connectAsVirtioUser(frontend);
    frontend.resumeQueues = (bases) => startAsVirtioUser(frontend, bases);
    await frontend.startQueues(4, { size: 256, bufferSpace: 512 << 10 });
    await lab.daemon.running();
    using here = NetGuest.adopt(frontend, macOfVf(0));
    await exchange(here, there);
    // Its second pair is enabled when the application asks for it.
    await frontend.useOnly(2);
    await exchange(here, there);
    for (let times = 0; times < 2; times++) {
      await frontend.useOnly(0);
      const bases: number[] = [];
      for (const { index } of frontend.queues) bases[index] = await frontend.getBase(index);
      expect(bases.filter((_, queue) => queue % 2 === 1)).toEqual(
        here.usedIndices.filter((_, queue) => queue % 2 === 1),
      );
      await startAsVirtioUser(frontend, bases);
      await exchange(here, there);
    }
    await here.checkBuffers();
  }, 30_000);
});

/** All pairs in use of both ends, each in its direction. */
async function exchange(here: NetGuest, there: NetGuest): Promise<void> {
  // What was sent before is done when this is answered; most of it has no answer of its own.
  await here.frontend.askU64(Request.GET_STATUS);
  const pairs = here.pairs.slice(0, here.frontend.enabled).map((_, pair) => pair);
  const streams = pairs.flatMap((pair) => [here.stream(pair, there), there.stream(pair, here)]);
  await Promise.all(streams.map((stream) => stream.progress(20)));
  expect(await Promise.all(streams.map((stream) => stream.stop()))).toEqual(streams.map(() => COMPLETE));
}

async function connectAsVirtioUser(frontend: NetFrontend): Promise<void> {
  await frontend.send(Request.SET_OWNER);
  const offered = await frontend.askU64(Request.GET_FEATURES);
  await frontend.askU64(Request.GET_PROTOCOL_FEATURES);
  frontend.protocolFeatures = featureBits(MQ, REPLY_ACK, STATUS);
  await frontend.send(Request.SET_PROTOCOL_FEATURES, u64(frontend.protocolFeatures));
  // Pairs.
  expect(await frontend.askU64(Request.GET_QUEUE_NUM)).toBe(4n);
  const { mac, mq, mrgRxbuf, status } = NetFeature;
  frontend.features = offered & (featureBits(mac, mq, mrgRxbuf, status) | (1n << 30n) | (1n << 32n));
  for (const bits of [0, acknowledge, acknowledge | driver]) await statusWithReply(frontend, bits);
}

/** Calls of all queues, 2, 5, 8 10 9 12 per queue, 18 for the first pair, and at last the status. */
async function startAsVirtioUser(frontend: NetFrontend, bases: readonly number[]): Promise<void> {
  frontend.replies = "as QEMU";
  const queues = [0, 2, 1, 3].map((index) => frontend.queues[index]!);
  for (const { index, driver } of queues) {
    await frontend.send(Request.SET_VRING_CALL, withoutFd(index));
    await frontend.send(Request.SET_VRING_CALL, u64(BigInt(index)), [driver.call.number]);
  }
  await frontend.setFeatures();
  await frontend.setMemTable();
  for (const queue of queues) await frontend.setupQueue(queue, bases[queue.index] ?? 0);
  await frontend.useOnly(1);
  await statusWithReply(frontend, acknowledge | driver | featuresOk | driverOk);
}

/** It waits half a minute for the answer to a status, and for no other but that to the memory. */
async function statusWithReply(frontend: VhostUserFrontend, bits: number): Promise<void> {
  await frontend.channel.send(Request.SET_STATUS, u64(BigInt(bits)), [], FLAG_NEED_REPLY);
  expect(U64.read((await frontend.channel.receive())!.payload).value).toBe(0n);
}
