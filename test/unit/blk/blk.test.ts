import { describe, expect, test } from "bun:test";
import blk from "../../../plugins/blk/index.ts";
import { silentLogger } from "../../../src/base/log.ts";
import { socketPair } from "../../../src/native/sys.ts";
import type { DeviceClass } from "../../../src/plugin.ts";
import { Session } from "../../../src/vhost-user/session.ts";
import { configSize, configValues } from "../../../src/virtio/config-space.ts";
import { describeFeatures, FeatureBit, featureBits } from "../../../src/virtio/features.ts";
import { VhostUserFrontend } from "../../kit/frontend/frontend.ts";
import { MockTarget } from "../../kit/mock-target.ts";

function deviceClass(): DeviceClass {
  const classes: DeviceClass[] = [];
  blk.setup({ deviceClass: (registered) => void classes.push(registered), adoption() {} });
  expect(classes).toHaveLength(1);
  return classes[0]!;
}

/** A disk of 3 GiB with blocks of 4096 bytes and 4 queues, as far as devices of VIRTIO 1.1 go. */
function config(): Uint8Array {
  const view = new DataView(new ArrayBuffer(60));
  view.setBigUint64(0, 6_291_456n, true);
  view.setUint32(20, 4096, true);
  view.setUint8(32, 1);
  view.setUint16(34, 4, true);
  return new Uint8Array(view.buffer);
}

const features = featureBits(6, 9, 11, 12, FeatureBit.version1);

describe("the block class", () => {
  test("reads the configuration by name; what the device lacks is 0", () => {
    const { configSpace } = deviceClass();
    expect(configSize(configSpace)).toBe(72);
    const values = configValues(configSpace, config());
    expect(values).toMatchObject({ capacity: 6_291_456n, blkSize: 4096, writeback: 1, numQueues: 4 });
    expect(values["secureEraseSectorAlignment"]).toBe(0);
  });

  test("has num_queues queues with MQ, else one", () => {
    const { queues, configSpace } = deviceClass();
    const values = configValues(configSpace, config());
    expect(queues(values, features)).toBe(4);
    expect(queues(values, 0n)).toBe(1);
    expect(queues(configValues(configSpace, new Uint8Array()), features)).toBe(1);
  });

  test("describes itself, and names its features", () => {
    const blkClass = deviceClass();
    const values = configValues(blkClass.configSpace, config());
    expect(blkClass.describe?.(values, features)).toEqual({
      capacity: "3221225472 (3 GiB)",
      block_size: "4096",
      queues: "4",
      read_only: "no",
    });
    const empty = configValues(blkClass.configSpace, new Uint8Array());
    expect(blkClass.describe?.(empty, 1n << 5n)).toMatchObject({
      capacity: "0 (0 B)",
      block_size: "512",
      read_only: "yes",
    });
    expect(describeFeatures(features, blkClass.features.names)).toEqual([
      ...["BLK_SIZE", "FLUSH", "CONFIG_WCE", "MQ", "VERSION_1"],
    ]);
  });
});

test("a block front-end reads 57 bytes of configuration and turns the write cache off, nothing else", async () => {
  const [ours, theirs] = socketPair();
  const target = new MockTarget({ deviceClass: deviceClass(), deviceFeatures: features, config: config() });
  const ended = new Session(ours, target, { log: silentLogger }).run();
  using frontend = new VhostUserFrontend(theirs);
  await frontend.negotiate();
  expect(await frontend.getConfig(0, 57)).toEqual(config().subarray(0, 57));
  expect(await frontend.setConfig(32, Uint8Array.of(0))).toBe(0n);
  expect(await frontend.setConfig(0, new Uint8Array(8))).toBe(1n);
  expect(target.calls).toEqual(["writeConfig 32 00"]);
  frontend[Symbol.dispose]();
  await ended;
});
