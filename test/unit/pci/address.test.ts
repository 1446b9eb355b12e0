import { expect, test } from "bun:test";
import { parsePciAddress } from "../../../src/pci/address.ts";

test("an address has one spelling", () => {
  for (const text of ["0000:af:04.5", "AF:04.5", "af:04.5", "0000:AF:04.5"]) {
    expect(parsePciAddress(text) as string).toBe("0000:af:04.5");
  }
  expect(parsePciAddress("10000:00:1f.7") as string).toBe("10000:00:1f.7");
});

test("what is none is refused", () => {
  for (const text of [
    "",
    "af",
    "af:04",
    "af:04.8",
    "af:20.0",
    "../etc/passwd",
    "0000:af:04.5\n",
    "g0:00.0",
    "000:af:04.5",
  ]) {
    expect(() => parsePciAddress(text)).toThrow(expect.objectContaining({ code: "badArguments" }));
  }
});
