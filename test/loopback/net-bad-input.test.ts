import { afterAll, afterEach, beforeAll, describe, expect, test } from "bun:test";
import { Deadline } from "../../src/base/deadline.ts";
import { liveFds } from "../../src/native/fd.ts";
import { eventfd } from "../../src/native/sys.ts";
import { ProtocolFeature, Request, VRING_ADDR, VRING_STATE } from "../../src/vhost-user/messages.ts";
import { featureBits } from "../../src/virtio/features.ts";
import { u64, withoutFd } from "../kit/frontend/frontend.ts";
import { MOVERS } from "../kit/movers.ts";
import type { NetFrontend } from "../kit/net/net-frontend.ts";
import { NetGuest } from "../kit/net/net-guest.ts";
import { macOfVf, NetLab } from "../kit/net/net-lab.ts";
import { COMPLETE, type FrameStream } from "../kit/net/streams.ts";

/** What the front-end of a network device must not send, while two other VFs have traffic of their own all the time. */

const SEND_RARP = 19;
const NET_SET_MTU = 20;
const PAIRS = 4;
/** Of the traffic that goes on meanwhile. */
const PACE = { interval: 2 };
/** Queues that a front-end has; behind them the device has its own control queue. */
const QUEUES = 2 * PAIRS;

const index = (request: number) => async (frontend: NetFrontend, queue: number) =>
  await frontend.send(request, VRING_STATE.encode({ index: queue, num: request === Request.SET_VRING_NUM ? 64 : 0 }));
const eventfdOf = (request: number) => async (frontend: NetFrontend, queue: number) => {
  using fd = eventfd();
  await frontend.send(request, u64(BigInt(queue)), [fd.number]);
};

/** Each message that names a queue. */
const NAMES_A_QUEUE = {
  SET_VRING_NUM: index(Request.SET_VRING_NUM),
  SET_VRING_BASE: index(Request.SET_VRING_BASE),
  GET_VRING_BASE: index(Request.GET_VRING_BASE),
  SET_VRING_ENABLE: index(Request.SET_VRING_ENABLE),
  SET_VRING_ADDR: (frontend: NetFrontend, queue: number) =>
    frontend.send(Request.SET_VRING_ADDR, VRING_ADDR.encode({ index: queue })),
  SET_VRING_KICK: eventfdOf(Request.SET_VRING_KICK),
  SET_VRING_CALL: eventfdOf(Request.SET_VRING_CALL),
  SET_VRING_ERR: eventfdOf(Request.SET_VRING_ERR),
  "SET_VRING_KICK without fd": (frontend: NetFrontend, queue: number) =>
    frontend.send(Request.SET_VRING_KICK, withoutFd(queue)),
};

/** Reasons with the value seen and the limit are the business of the class's own tests. */
const REFUSED = [
  { what: "an MTU below that of IPv4", request: NET_SET_MTU, value: 67n },
  { what: "an MTU above the device's", request: NET_SET_MTU, value: 1501n },
  { what: "an MTU of 2^64 - 1", request: NET_SET_MTU, value: 2n ** 64n - 1n },
  { what: "a RARP for the address 0", request: SEND_RARP, value: 0n },
  { what: "a RARP for a group of stations", request: SEND_RARP, value: 0x0000_0000_0001n },
  { what: "a RARP for all stations", request: SEND_RARP, value: 0xffff_ffff_ffffn },
];

describe.each(MOVERS)("moved by $mover", ({ mover, migration }) => {
  let lab: NetLab;
  let bystanders: readonly NetGuest[];
  let traffic: readonly FrameStream[];
  beforeAll(async () => {
    lab = await NetLab.create({
      migration,
      pairs: PAIRS,
      vfs: 4,
      deadlines: { firstBackoff: 1, longestBackoff: 1 },
    });
    bystanders = [await lab.boot(2, { pairs: 2 }), await lab.boot(3, { pairs: 2, mergeable: false })];
    const [here, there] = bystanders;
    traffic = [...here!.streams(there!, PACE), ...there!.streams(here!, PACE)];
  }, 30_000);
  afterEach(async () => {
    for (const stream of traffic) await stream.progress(10);
  });
  afterAll(async () => {
    const results = await Promise.all(traffic.map((stream) => stream.stop()));
    for (const guest of bystanders) await guest.checkBuffers();
    for (const guest of bystanders) guest[Symbol.dispose]();
    await lab?.[Symbol.asyncDispose]();
    expect(results).toEqual(traffic.map(() => COMPLETE));
  });

  test("a queue that is not there ends the session, whichever message names it", async () => {
    await lab.idle(0, 1);
    const idle = liveFds();
    for (const [name, send] of Object.entries(NAMES_A_QUEUE)) {
      for (const queue of [QUEUES, 0xff]) {
        using frontend = lab.dial(0);
        await lab.daemon.run(frontend, 2);
        const { warnings } = lab.daemon;
        const before = warnings.length;
        await send(frontend, queue);
        await frontend.hungUp();
        await lab.idle(0);
        const said = warnings.slice(before).join("\n");
        expect({ name, said }).toEqual({
          name,
          said: expect.stringContaining(`queue index ${queue} is out of range, there are ${QUEUES} queues`),
        });
      }
    }
    await lab.idle(0, 1);
    expect(liveFds()).toBe(idle);
  }, 30_000);

  test("what the device cannot do is refused, and the session goes on", async () => {
    await lab.idle(0, 1);
    {
      using guest = await lab.boot(0);
      for (const { what, request, value } of REFUSED) {
        const answer = await guest.frontend.command(request, u64(value));
        expect({ what, refused: answer !== 0n }).toEqual({ what, refused: true });
      }
      for (const mtu of [68n, 1500n]) expect(await guest.frontend.command(NET_SET_MTU, u64(mtu))).toBe(0n);
      expect(lab.info(0).state).toBe("running");
    }
    await lab.idle(0);
    // A front-end that cannot be told.
    using guest = await lab.boot(0, { protocolFeatures: ~featureBits(ProtocolFeature.REPLY_ACK) });
    for (const { request, value } of REFUSED) await guest.frontend.send(request, u64(value));
    expect(await guest.frontend.askU64(Request.GET_STATUS)).toBe(0xfn);
  }, 30_000);

  for (const rings of [[0], [1], [0, 1, 2], [0, 1, 3], [2, 3]]) {
    test(`rings ${rings.join(", ")} alone: whole pairs receive, whoever has a ring to send by sends`, async () => {
      await lab.idle(0, 1);
      using there = await lab.boot(1, { pairs: 2 });
      const frontend = lab.dial(0, { pairs: 2 });
      const { setupQueue } = frontend;
      frontend.setupQueue = async (queue, base) => {
        if (rings.includes(queue.index)) await setupQueue.call(frontend, queue, base);
      };
      using here = await NetGuest.boot(frontend, { mac: macOfVf(0) });
      await lab.daemon.running();
      const streams: FrameStream[] = [];
      for (const pair of [0, 1]) {
        const whole = rings.includes(2 * pair) && rings.includes(2 * pair + 1);
        if (whole) streams.push(there.stream(pair, here));
        if (rings.includes(2 * pair + 1)) streams.push(here.stream(pair, there));
      }
      await Promise.all(streams.map((stream) => stream.progress(20)));
      expect(await Promise.all(streams.map((stream) => stream.stop()))).toEqual(streams.map(() => COMPLETE));
      await here.checkBuffers();
      expect(lab.info(0).reason).toBeNull();
    }, 30_000);
  }

  test("four RARPs before the rings start, as on the destination of a migration", async () => {
    await lab.idle(0, 1);
    using there = await lab.boot(1);
    const frontend = lab.dial(0);
    const { resumeQueues } = frontend;
    frontend.resumeQueues = async (bases) => {
      for (let times = 0; times < 4; times++) {
        expect(await frontend.command(SEND_RARP, u64(0x1234_5678_9a02n))).toBe(0n);
      }
      await resumeQueues.call(frontend, bases);
    };
    using here = await NetGuest.boot(frontend);
    const streams = [...here.streams(there), ...there.streams(here)];
    await Promise.all(streams.map((stream) => stream.progress(20)));
    expect(await Promise.all(streams.map((stream) => stream.stop()))).toEqual([COMPLETE, COMPLETE]);
  }, 30_000);

  test("the front-end of the peer is killed: this one's is hung up on, and welcome when the peer is back", async () => {
    await lab.idle(0, 1);
    const options = { protocolFeatures: ~featureBits(ProtocolFeature.CONFIG) };
    let there = await lab.boot(1);
    using here = await lab.boot(0, options);
    await here.stream(0, there).progress(20);
    there[Symbol.dispose]();
    if (mover === "registers") {
      const said = () => lab.info(0).reason?.includes("the link is down") || undefined;
      await Deadline.after(10_000, "the reason").poll(said, 2);
      there = await lab.boot(1);
    } else {
      await here.frontend.hungUp();
      await here.reconnect(
        () => lab.dial(0, options),
        async () => {
          using refused = lab.dial(0, options);
          await refused.hungUp();
          there = await lab.boot(1);
          await Deadline.after(10_000, "the link").poll(() => lab.info(0).reason === null || undefined, 2);
        },
      );
    }
    using peer = there;
    const streams = [...here.streams(peer), ...peer.streams(here)];
    await Promise.all(streams.map((stream) => stream.progress(50)));
    for (const { reordered } of await Promise.all(streams.map((stream) => stream.stop()))) expect(reordered).toBe(0);
    await here.checkBuffers();
    await peer.checkBuffers();
  }, 30_000);
});
