import { expect, test } from "bun:test";
import { parsePciAddress } from "../../../src/pci/address.ts";
import { vfAddress } from "../../../src/softvf/topology.ts";

test("VFs follow their PF by routing ID", () => {
  const pf = parsePciAddress("0000:5a:00.0");
  const addresses = [0, 6, 7, 254, 255, 600].map((index) => String(vfAddress(pf, index)));
  expect(addresses).toEqual([
    "0000:5a:00.1",
    "0000:5a:00.7",
    "0000:5a:01.0",
    "0000:5a:1f.7",
    "0000:5b:00.0",
    "0000:5c:0b.1",
  ]);
  expect(() => vfAddress(parsePciAddress("0001:ff:1f.0"), 7)).toThrow("beyond bus ff");
});
