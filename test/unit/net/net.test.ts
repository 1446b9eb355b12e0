import { describe, expect, test } from "bun:test";
import net from "../../../plugins/net/index.ts";
import type { ClassDevice, ControlCommand, DeviceClass } from "../../../src/plugin.ts";
import { configSize, configValues } from "../../../src/virtio/config-space.ts";
import { describeFeatures, featureBits } from "../../../src/virtio/features.ts";
import { rejection } from "../../kit/rejection.ts";

const classes: DeviceClass[] = [];
net.setup({ deviceClass: (registered) => void classes.push(registered), adoption() {} });
const netClass = classes[0]!;

const MTU = 3;
const MAC = 5;
const STATUS = 16;
const CTRL_VQ = 17;
const CTRL_RX = 18;
const MQ = 22;
const SPEED_DUPLEX = 63;

/** 02:00:00:aa:bb:cc, link up, 4 pairs, MTU 9000, 10 Gb/s full duplex. */
const BYTES = Uint8Array.from(
  [0x02, 0, 0, 0xaa, 0xbb, 0xcc, 1, 0, 4, 0, 0x28, 0x23, 0x10, 0x27, 0, 0, 1].concat(Array<number>(7).fill(0)),
);
const config = (change: Record<string, number | bigint> = {}) => ({
  ...configValues(netClass.configSpace, BYTES),
  ...change,
});

test("the configuration space is read by name", () => {
  expect(configSize(netClass.configSpace)).toBe(24);
  expect(config()).toMatchObject({ mac: 0xccbbaa000002n, status: 1, maxVirtqueuePairs: 4, mtu: 9000, speed: 10_000 });
});

describe("queues", () => {
  const cases = [
    ["with MQ and a control queue all pairs", [MQ, CTRL_VQ], {}, 8, 8, "4"],
    ["without a control queue one pair", [MQ], {}, 2, undefined, "1 (of 4: the VF has no control queue)"],
    ["without MQ one pair, whatever the field says", [CTRL_VQ], {}, 2, 2, "1"],
    ["with nothing one pair", [], {}, 2, undefined, "1"],
    ["with MQ and no pairs one", [MQ, CTRL_VQ], { maxVirtqueuePairs: 0 }, 2, 2, "1"],
    ["with as many as the field holds", [MQ, CTRL_VQ], { maxVirtqueuePairs: 0xffff }, 131_070, 131_070, "65535"],
  ] as const;
  for (const [name, bits, change, queues, control, shown] of cases) {
    test(name, () => {
      const features = featureBits(...bits);
      expect(netClass.queues(config(change), features)).toBe(queues);
      expect(netClass.control?.queue(config(change), features)).toBe(control);
      expect(netClass.describe?.(config(change), features)).toMatchObject({ queue_pairs: shown });
    });
  }

  test("even ones receive, and the PF's admin queue follows the pairs", () => {
    expect([0, 1, 2, 3, 7, 8].map((queue) => netClass.receives?.(queue))).toEqual([
      true,
      false,
      true,
      false,
      false,
      true,
    ]);
    expect(netClass.adminQueue?.(config(), featureBits(MQ))).toBe(8);
    expect(netClass.adminQueue?.(config(), 0n)).toBe(2);
  });
});

test("the link is up where the device says so, or cannot say", () => {
  const status = featureBits(STATUS);
  expect(netClass.linkUp?.(config(), status)).toBe(true);
  expect(netClass.linkUp?.(config({ status: 2 }), status)).toBe(false);
  expect(netClass.linkUp?.(config({ status: 0 }), 0n)).toBe(true);
});

test("describes itself as far as the device says something", () => {
  const features = featureBits(MTU, MAC, STATUS, SPEED_DUPLEX);
  expect(netClass.describe?.(config(), features)).toEqual({
    mac: "02:00:00:aa:bb:cc",
    link: "up",
    mtu: "9000",
    queue_pairs: "1",
    speed: "10000 Mb/s, full duplex",
  });
  expect(netClass.describe?.(config({ speed: 0xffff_ffff }), features)).toMatchObject({ speed: "unknown" });
  expect(netClass.describe?.(config({ duplex: 0xff, status: 0 }), features)).toMatchObject({
    link: "down",
    speed: "10000 Mb/s",
  });
  expect(netClass.describe?.(config(), 0n)).toEqual({
    ...{ mac: "unknown", link: "unknown", mtu: "unknown", queue_pairs: "1", speed: "unknown" },
  });
});

test("a state goes on where MAC, link, pairs and MTU are the same, and speed where it was negotiated", () => {
  expect(netClass.comparedConfig?.(0n)).toEqual(["mac", "status", "maxVirtqueuePairs", "mtu"]);
  expect(netClass.comparedConfig?.(featureBits(SPEED_DUPLEX))).toEqual([
    ...["mac", "status", "maxVirtqueuePairs", "mtu", "speed", "duplex"],
  ]);
});

test("features: the guest is offered GUEST_ANNOUNCE, and nothing that a control queue is needed for", () => {
  const { names, add = [], hide = [] } = netClass.features;
  const named = (bits: readonly number[]) => describeFeatures(featureBits(...bits), names);
  expect(named(add)).toEqual(["GUEST_ANNOUNCE"]);
  const commands = ["CTRL_GUEST_OFFLOADS", "CTRL_VQ", "CTRL_RX", "CTRL_VLAN", "CTRL_RX_EXTRA", "CTRL_MAC_ADDR"];
  const later = ["DEVICE_STATS", "VQ_NOTF_COAL", "NOTF_COAL", "HASH_REPORT", "RSS", "STANDBY"];
  expect(named(hide)).toEqual([...commands, ...later]);
  expect(hide).not.toContain(MQ);
});

describe("the function's own control queue", () => {
  const commands = (queues: readonly number[], ...bits: number[]): readonly ControlCommand[] =>
    netClass.control?.commands({ queues, config: config(), features: featureBits(...bits) }) ?? [];
  const requests = (...given: Parameters<typeof commands>) => commands(...given).map(({ request }) => [...request]);
  const PROMISC_ON = [0, 0, 1];

  test("is told the pairs up to the last that is in use, and to receive everything", () => {
    expect(requests([0, 1, 2, 3], MQ, CTRL_RX)).toEqual([[4, 0, 2, 0], PROMISC_ON]);
    expect(requests([0, 1, 6], MQ)).toEqual([[4, 0, 4, 0]]);
    expect(requests([], MQ)).toEqual([[4, 0, 1, 0]]);
    expect(requests([1022, 1023], MQ)).toEqual([[4, 0, 0, 2]]);
    expect(requests([0, 1], CTRL_RX)).toEqual([PROMISC_ON]);
    expect(requests([0, 1])).toEqual([]);
  });

  test("answers with one byte, 0 for yes; that everything is received may be refused", () => {
    const [pairs, promiscuous] = commands([0, 1], MQ, CTRL_RX);
    for (const command of [pairs!, promiscuous!]) {
      expect(command.answerSize).toBe(1);
      expect([0, 1, 255].map((byte) => command.accepted(Uint8Array.of(byte)))).toEqual([true, false, false]);
      expect(command.accepted(new Uint8Array(0))).toBe(false);
    }
    expect([pairs?.optional, promiscuous?.optional]).toEqual([undefined, true]);
  });

  test("the features for it are acknowledged; the same is in a managed VF's state", () => {
    expect(netClass.control?.features).toEqual([CTRL_VQ, CTRL_RX, MQ]);
    expect(netClass.stateFields?.(config(), 0n)).toEqual([{ type: 4, bytes: Uint8Array.of(1, 0, 0, 0) }]);
  });
});

describe("messages", () => {
  const [SEND_RARP, NET_SET_MTU] = [19, 20];
  const logged: string[] = [];
  const device = (features: bigint): ClassDevice => ({
    config: config(),
    features,
    log: (text) => void logged.push(text),
  });
  const send = async (request: number, value: bigint, features = featureBits(MTU)) => {
    const payload = new Uint8Array(BigUint64Array.of(value).buffer);
    return await netClass.messages![request]!.handle(payload, device(features), []);
  };

  test("need protocol features that the class brings", () => {
    const needs = [SEND_RARP, NET_SET_MTU].map((request) => netClass.messages![request!]?.needs);
    expect(needs).toEqual([2, 4]);
    expect(netClass.protocolFeatures).toEqual([2, 4]);
  });

  test("an MTU is taken from 68 up to the function's, or up to what the field holds", async () => {
    const [noMtu, withMtu] = [0n, featureBits(MTU)];
    for (const [mtu, features] of [
      [68n, withMtu],
      [9000n, withMtu],
      [65_535n, noMtu],
    ] as const) {
      expect(await send(NET_SET_MTU!, mtu, features)).toBeUndefined();
    }
    const bad = [
      [67n, withMtu, "the MTU is 67; this function takes 68 to 9000"],
      [9001n, withMtu, "the MTU is 9001; this function takes 68 to 9000"],
      [65_536n, noMtu, "the MTU is 65536; this function takes 68 to 65535"],
      [1n << 63n, noMtu, "the MTU is 9223372036854775808; "],
    ] as const;
    for (const [mtu, features, reason] of bad) {
      expect((await rejection(send(NET_SET_MTU!, mtu, features))).message).toContain(reason);
    }
  });

  test("an announcement must be of an address that one device can have, and is said to be the guest's business", async () => {
    await send(SEND_RARP!, 0xccbbaa000002n);
    expect(logged.at(-1)).toContain("02:00:00:aa:bb:cc is not announced");
    expect((await rejection(send(SEND_RARP!, 0n))).message).toContain("all zeroes");
    expect((await rejection(send(SEND_RARP!, 0xffff_ffff_ffffn))).message).toContain(
      "ff:ff:ff:ff:ff:ff: it is a group",
    );
    expect((await rejection(send(SEND_RARP!, 0x01n))).message).toContain("01:00:00:00:00:00");
  });
});
