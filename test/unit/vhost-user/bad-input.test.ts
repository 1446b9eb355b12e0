import { expect, test } from "bun:test";
import { encodeMessage, PROTOCOL_VERSION, ProtocolFeature, Request } from "../../../src/vhost-user/messages.ts";
import { FeatureBit, featureBits, Status } from "../../../src/virtio/features.ts";
import { BAD_INPUT, prepareFor } from "../../kit/frontend/bad-input.ts";
import { connect, fdsLeftBy, REGIONS, startRunning } from "./harness.ts";

for (const input of BAD_INPUT) {
  test(`${input.what} ends the session with a reason`, async () => {
    await using bystander = connect();
    await startRunning(bystander.frontend);
    const left = await fdsLeftBy(async () => {
      await using pair = connect();
      const { frontend, target, ended, lines } = pair;
      await prepareFor(input, frontend);
      await Promise.all([input.send(frontend).catch(() => {}), ended]);
      const end = await ended;
      for (const part of input.reason) expect(end.reason).toContain(part);
      expect(end.error).toBeInstanceOf(Error);
      expect(lines.filter((line) => line.includes(end.reason))).toHaveLength(1);
      expect(target.mapped).toEqual([]);
      expect(target.running).toBeUndefined();
      expect(target.calls.filter((call) => call === "release")).toHaveLength(1);
      await frontend.hungUp();
    });
    expect(left).toBe(0);
    expect(bystander.target.running?.queues).toHaveLength(2);
    expect(await bystander.frontend.stop({ order: "old" })).toEqual([0, 0]);
  });
}

test("a driver without VERSION_1 is refused with the fix", async () => {
  await using pair = connect();
  await pair.frontend.negotiate({ features: ~featureBits(FeatureBit.version1) });
  await pair.frontend.setupMemory(REGIONS);
  await pair.frontend.startQueues(1).catch(() => {});
  expect((await pair.ended).reason).toContain("VERSION_1");
  expect(pair.lines.at(-1)).toContain("disable-legacy=on");
});

test("FEATURES_OK is not confirmed without VERSION_1", async () => {
  await using pair = connect();
  const { frontend } = pair;
  await frontend.negotiate();
  await frontend.setFeatures(featureBits(FeatureBit.vhostUserProtocolFeatures));
  await frontend.setStatus(Status.featuresOk | Status.driver);
  expect(await frontend.askU64(Request.GET_STATUS)).toBe(BigInt(Status.driver));
  await frontend.setFeatures();
  expect(await frontend.askU64(Request.GET_STATUS)).toBe(BigInt(Status.featuresOk | Status.driver));
});

test("without REPLY_ACK nothing is answered that has no answer of its own", async () => {
  await using pair = connect();
  const { frontend } = pair;
  await frontend.negotiate({ protocolFeatures: ~featureBits(ProtocolFeature.REPLY_ACK) });
  await frontend.channel.sendRaw(encodeMessage(Request.SET_OWNER, PROTOCOL_VERSION | 0x8, new Uint8Array()));
  expect(await frontend.askU64(Request.GET_QUEUE_NUM)).toBe(4n);
});
