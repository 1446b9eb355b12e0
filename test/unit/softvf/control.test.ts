import { expect, test } from "bun:test";
import { parsePciAddress } from "../../../src/pci/address.ts";
import type { SoftDeviceClass } from "../../../src/plugin.ts";
import type { Call } from "../../../src/rpc/method.ts";
import { controlMethods } from "../../../src/softvf/control.ts";
import type { ServedFunction } from "../../../src/softvf/physical-function.ts";
import { rejection } from "../../kit/rejection.ts";

const CALL: Call = { client: "test", log: () => {}, notify: () => {}, onClose: () => {} };

/** A VF whose options a, b and c are live; what is set goes to `log`, setting `broken` fails. */
function vf(log: string[], broken: string): ServedFunction {
  const address = parsePciAddress("0000:5a:00.1");
  const live = { type: "number", description: "", live: true } as const;
  const softDevice = { pciClass: 0, options: { a: live, b: live, c: live } } as unknown as SoftDeviceClass;
  const fn = {
    check: (option: string, value: unknown) => {
      if (value === 0) throw new Error(`option ${option} is 0`);
    },
    set: async (option: string) => {
      if (option === broken) throw new Error(`${option} broke`);
      log.push(option);
    },
  };
  return {
    address,
    pf: parsePciAddress("0000:5a:00.0"),
    fn,
    deviceClass: { name: "x", softDevice },
  } as unknown as ServedFunction;
}

test("what was set before an option failed is said; one that does not fit keeps the others from being set", async () => {
  const log: string[] = [];
  const set = controlMethods(() => [vf(log, "c")]).find(({ name }) => name === "set")!;
  const invoke = async (options: Record<string, string>) => set.invoke({ address: "0000:5a:00.1", options }, CALL);
  expect((await rejection(invoke({ a: "1", b: "0" }))).message).toContain("option b is 0; nothing was set");
  expect((await rejection(invoke({ b: "0" }))).message).toMatch(/option b is 0$/);
  expect(log).toEqual([]);
  expect((await rejection(invoke({ a: "1", b: "1", c: "1" }))).message).toContain("c broke; set before that: a, b");
  expect((await rejection(invoke({ c: "1" }))).message).toMatch(/c broke$/);
});
