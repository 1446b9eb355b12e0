import { expect, test } from "bun:test";
import { parsePciAddress } from "../../../src/pci/address.ts";
import type { SoftDeviceClass } from "../../../src/plugin.ts";
import { optionByFlag, optionFlag, optionsOfVf, parseOption } from "../../../src/softvf/class-options.ts";

const softDevice: SoftDeviceClass = {
  pciClass: 0,
  options: {
    image: { type: "string", description: "" },
    serial: { type: "string", description: "", default: "disk-{vf}" },
    blockSize: { type: "number", description: "", default: 512 },
  },
  create: () => {
    throw new Error("not made here");
  },
};

test("options are written with dashes", () => {
  expect(optionFlag("blockSize")).toBe("block-size");
  expect(optionByFlag(softDevice.options, "block-size")).toBe("blockSize");
  expect(optionByFlag(softDevice.options, "toString")).toBeUndefined();
});

test("values are read by type", () => {
  const read = (type: "string" | "path" | "number" | "size" | "boolean", value: unknown) =>
    parseOption("x", { type, description: "" }, value, "/from/here");
  expect([read("size", "2G"), read("size", "512"), read("size", "3MiB"), read("size", 7)]).toEqual([
    2 ** 31,
    512,
    3 << 20,
    7,
  ]);
  expect([read("number", "42"), read("number", 0), read("boolean", "on"), read("boolean", false)]).toEqual([
    42,
    0,
    true,
    false,
  ]);
  expect([read("path", "a/b"), read("path", "/a"), read("string", "a/b")]).toEqual(["/from/here/a/b", "/a", "a/b"]);
  expect(parseOption("x", { type: "string", description: "", default: "" }, "", "/")).toBe("");
  expect(() => read("size", "999999T")).toThrow("must be at most 8191T");
  for (const [type, value] of [
    ["size", "2X"],
    ["size", "99999999T"],
    ["size", -1],
    ["number", "1.5"],
    ["number", -1],
    ["number", ""],
    ["boolean", "maybe"],
    ["string", ""],
    ["string", "a\0b"],
  ] as const) {
    expect(() => read(type, value)).toThrow("option x is");
  }
});

test("a VF gets defaults, its number and the address of its PF", () => {
  const pf = parsePciAddress("0000:5b:00.0");
  const options = optionsOfVf(softDevice, { image: "/images/{pf}/{vf}-{vf}.img", queues: 4 }, { pf, vf: 3 });
  expect(options).toEqual({
    image: "/images/0000:5b:00.0/3-3.img",
    serial: "disk-3",
    blockSize: 512,
    queues: 4,
    ringSize: 256,
    vectors: undefined,
  });
  for (const bad of [{ queues: 0 }, { ringSize: 3 }, { ringSize: 65536 }, { vectors: 4096 }]) {
    expect(() => optionsOfVf(softDevice, bad, { pf, vf: 0 })).toThrow("must be");
  }
});
