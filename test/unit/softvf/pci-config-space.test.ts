import { expect, test } from "bun:test";
import { functionLayout } from "../../../src/softvf/layout.ts";
import { PciConfigSpace } from "../../../src/softvf/pci-config-space.ts";
import { PciCommand, PciConfig, VIRTIO_CAP } from "../../../src/virtio/registers.ts";

const IDENTITY = {
  vendor: 0x1af4,
  device: 0x1042,
  subsystemVendor: 1,
  subsystemDevice: 2,
  revision: 1,
  class: 0x010203,
};
const ALL_ONES = Uint8Array.of(0xff, 0xff, 0xff, 0xff);

const space = () => new PciConfigSpace(IDENTITY, functionLayout(4, 5, 60));
const read32 = (config: PciConfigSpace, offset: number) =>
  new DataView(config.read(offset, 4).buffer).getUint32(0, true);

test("identity and capabilities can be walked, each inside the conventional space", () => {
  const config = space();
  expect(read32(config, 0)).toBe(0x10421af4);
  expect(read32(config, 8)).toBe(0x01020301);
  const types: number[] = [];
  for (let at = config.read(PciConfig.capabilities, 1)[0]!; at !== 0; at = config.read(at + 1, 1)[0]!) {
    expect(at).toBeLessThan(PciConfig.size);
    const { id, type, offset, size } = VIRTIO_CAP.read(config.read(at, 16));
    types.push(id);
    if (id === 9) expect([type, offset, size]).toEqual(VIRTIO_BLOCKS[type]!);
  }
  expect(types).toEqual([0x10, 0x11, 9, 9, 9, 9, 9]);
});

const VIRTIO_BLOCKS: Readonly<Record<number, number[]>> = {
  1: [1, 0, 64],
  2: [2, 0x3000, 0x4000],
  3: [3, 0x1000, 4],
  4: [4, 0x2000, 60],
  5: [5, 0, 0],
};

test("address registers show their size, read-only fields keep their value", () => {
  const config = space();
  for (const offset of [0, 8, 0x10, 0x14, 0x18, 0x20, 0x24, 0x30, 0x3c]) config.write(offset, ALL_ONES);
  expect(read32(config, 0)).toBe(0x10421af4);
  expect(read32(config, 0x10)).toBe(0);
  expect(read32(config, 0x14)).toBe(0xffffe000);
  expect(read32(config, 0x20)).toBe(0xffff800c);
  expect(read32(config, 0x24)).toBe(0xffffffff);
  expect(read32(config, 0x30)).toBe(0);
});

test("bus master and function reset have effects", () => {
  const config = space();
  const command = Uint8Array.of(PciCommand.busMaster, 0);
  expect(config.write(PciConfig.command, command)).toEqual(["busMaster"]);
  expect(config.write(PciConfig.command, command)).toEqual([]);
  expect(config.busMaster).toBe(true);
  expect(config.write(PciConfig.command, Uint8Array.of(0, 0))).toEqual(["busMaster"]);
  expect(config.write(0x48, Uint8Array.of(0, 0x80))).toEqual(["functionReset"]);
  expect(config.read(0x49, 1)[0]).toBe(0);
  config.write(PciConfig.command, command);
  config.reset();
  expect(config.busMaster).toBe(false);
});

test("a write over many registers has the effects of each", () => {
  const config = space();
  const bytes = config.read(PciConfig.command, 252);
  bytes[0] = PciCommand.busMaster;
  bytes[0x49 - PciConfig.command] = 0x80;
  expect(config.write(PciConfig.command, bytes)).toEqual(["functionReset", "busMaster", "windowWrite"]);
});
