import { describe, expect, test } from "bun:test";
import { Deadline } from "../../../src/base/deadline.ts";
import { FeatureBit, featureBits } from "../../../src/virtio/features.ts";
import { VirtioPciDevice } from "../../../src/virtio/pci-device.ts";
import { PciCommand, PciConfig } from "../../../src/virtio/registers.ts";
import { FAKE_CAPS, FakeFunction } from "../../kit/fake-function.ts";
import { rejection } from "../../kit/rejection.ts";

const soon = (ms = 1000) => Deadline.after(ms, "the test");
const probe = (fn: FakeFunction) => VirtioPciDevice.probe(fn, soon());

describe("probing", () => {
  test("finds a block device, its features, its queues and its doorbells", async () => {
    const fn = new FakeFunction({ features: featureBits(6, FeatureBit.ringReset), queues: 3, queueSize: 512 });
    const device = await probe(fn);
    expect(device.virtioId).toBe(2);
    expect(await device.features()).toBe(featureBits(6, FeatureBit.version1, FeatureBit.ringReset));
    expect(await device.queueLimits()).toEqual([0, 1, 2].map((notifyOff) => ({ sizeMax: 512, notifyOff })));
    await device.doorbell(2, 2).ring(2);
    expect(fn.rung).toEqual([2]);
  });

  test("lets the function decode its registers and use MSI-X, and keeps it from memory until it is set up", async () => {
    const fn = new FakeFunction();
    fn.configBytes[PciConfig.command] = PciCommand.busMaster;
    const device = await probe(fn);
    expect(fn.configBytes[PciConfig.command]! & 0x6).toBe(PciCommand.memory);
    expect(fn.configBytes[FAKE_CAPS.msix + 3]! & 0x80).toBe(0x80);
    await device.reset(soon());
    expect(fn.configBytes[PciConfig.command]! & PciCommand.busMaster).toBe(0);
    await device.negotiate(featureBits(FeatureBit.version1));
    expect(fn.configBytes[PciConfig.command]! & PciCommand.busMaster).toBe(PciCommand.busMaster);
  });

  test("a doorbell's page is its own where nothing else is in it", async () => {
    const owns = async (queue: number, change: (fn: FakeFunction) => void, multiplier = 4096) => {
      const fn = new FakeFunction({ queues: 2, multiplier });
      change(fn);
      const device = await probe(fn);
      return device.ownsDoorbellPage(queue, await device.queueLimits(), 4096);
    };
    const same = () => {};
    expect(await owns(0, same)).toBe(true);
    expect(await owns(1, same)).toBe(true);
    expect(await owns(2, same)).toBe(false);
    expect(await owns(0, same, 4)).toBe(false); // the other queue's is in it
    expect(await owns(0, same, 8192)).toBe(true);
    expect(await owns(0, (fn) => fn.notifyOff.fill(1))).toBe(false); // the same doorbell
    expect(await owns(1, (fn) => (fn.notifyOff[1] = 2))).toBe(false); // beyond the area
    expect(await owns(1, (fn) => (fn.notifyOff[1] = 1), 2048)).toBe(false); // not at its begin
    // The device configuration, at 0x2000, is named in the middle of the notification area.
    const overlap = (fn: FakeFunction) => fn.configBytes.set([0, 0x40], FAKE_CAPS.device + 8);
    expect(await owns(1, overlap)).toBe(false);
    expect(await owns(0, overlap)).toBe(true);
  });

  test("a device at which nobody answers is gone, unless it is being reset", async () => {
    const fn = new FakeFunction();
    const device = await probe(fn);
    fn.faults.silent = true;
    expect(await rejection(device.reset(soon(5)))).toMatchObject({ code: "resetTimedOut" });
    expect(await rejection(device.status())).toMatchObject({ code: "noDevice" });
    expect((await device.gone).message).toMatch(/all ones/);
  });

  const bent: [string, (bytes: Uint8Array) => void, RegExp][] = [
    ["another vendor", (bytes) => bytes.set([0x86, 0x80], 0), /8086:1042/],
    ["a transitional device", (bytes) => bytes.set([0x01, 0x10], 2), /1af4:1001/],
    ["no capability list", (bytes) => bytes.set([0], 6), /no capability list/],
    ["a capability list that loops", (bytes) => bytes.set([FAKE_CAPS.msix], FAKE_CAPS.device + 1), /comes back/],
    ["a capability list into the header", (bytes) => bytes.set([0x10], FAKE_CAPS.device + 1), /into the header/],
    ["no MSI-X", (bytes) => bytes.set([0x05], FAKE_CAPS.msix), /MSI-X/],
    ["no common configuration", (bytes) => bytes.set([8], FAKE_CAPS.common + 3), /no common configuration/],
    ["no doorbells", (bytes) => bytes.set([8], FAKE_CAPS.notify + 3), /no notification/],
    ["a reserved BAR", (bytes) => bytes.set([6], FAKE_CAPS.common + 4), /no common configuration.*BAR 6/],
    ["a BAR that it does not have", (bytes) => bytes.set([2], FAKE_CAPS.common + 4), /no BAR 2/],
    ["registers beyond the BAR", (bytes) => bytes.set([0xff, 0x3f], FAKE_CAPS.common + 8), /ends at 16447 of BAR 4/],
    ["an offset that wraps", (bytes) => bytes.fill(0xff, FAKE_CAPS.notify + 8, FAKE_CAPS.notify + 16), /ends at/],
    ["a common configuration cut short", (bytes) => bytes.set([16], FAKE_CAPS.common + 12), /has 16 bytes/],
    ["a strange multiplier", (bytes) => bytes.set([3], FAKE_CAPS.notify + 16), /multiplier is 3/],
  ];
  test.each(bent)("refuses %s, naming it", async (_, bend, message) => {
    const fn = new FakeFunction();
    bend(fn.configBytes);
    expect((await rejection(probe(fn))).message).toMatch(message);
  });

  test("does not touch a doorbell outside the notification area", async () => {
    const device = await probe(new FakeFunction());
    expect(() => device.doorbell(0, 0x400)).toThrow(/0x1000|4096 of 4096/);
  });
});

describe("driving", () => {
  test("a reset that never ends is given up at the deadline", async () => {
    const fn = new FakeFunction();
    fn.status = 0x0f;
    fn.faults.resetNeverEnds = true;
    const device = await probe(fn);
    expect(await rejection(device.reset(soon(20)))).toMatchObject({
      code: "resetTimedOut",
      message: expect.stringMatching(/0xf/),
    });
  });

  test("says so where the device does not accept the features", async () => {
    const fn = new FakeFunction({ features: featureBits(5) });
    fn.faults.refusedFeatures = featureBits(5);
    const device = await probe(fn);
    expect((await rejection(device.negotiate(featureBits(5, FeatureBit.version1)))).message).toMatch(/0x100000020/);
  });

  test("reads a configuration space that has not changed meanwhile, and pads it", async () => {
    const fn = new FakeFunction({ config: Uint8Array.of(1, 2, 3, 4) });
    const device = await probe(fn);
    expect(await device.readConfig(6)).toEqual(Uint8Array.of(1, 2, 3, 4, 0, 0));
    fn.faults.generationSpins = true;
    expect(await rejection(device.readConfig(4))).toMatchObject({ code: "again" });
  });

  test("writes the configuration space, within its bounds only", async () => {
    const fn = new FakeFunction({ config: new Uint8Array(4) });
    const device = await probe(fn);
    await device.writeConfig(2, Uint8Array.of(7, 8));
    expect(fn.deviceConfig).toEqual(Uint8Array.of(0, 0, 7, 8));
    expect(await rejection(device.writeConfig(3, Uint8Array.of(1, 2)))).toMatchObject({ code: "invalid" });
  });
});
