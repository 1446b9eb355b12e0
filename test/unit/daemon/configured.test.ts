import { expect, test } from "bun:test";
import { join } from "node:path";
import { silentLogger } from "../../../src/base/log.ts";
import { addConfigured } from "../../../src/daemon/configured.ts";
import { type PciAddress, parsePciAddress } from "../../../src/pci/address.ts";
import { Bus } from "../../../src/pci/bus.ts";
import { KernelBus, PF, PLAIN, VF } from "./kernel-bus.ts";

/** The functions of the configuration, added when the daemon starts. */

const UUID = "ee8b6429-eb1e-45e7-9dab-aff843b99075";
const NOWHERE = parsePciAddress("0000:7f:00.0");

test("PFs come first; of one VM those that take a token, attached before the others are opened", async () => {
  await using kernel = await KernelBus.create();
  const { registry, steps } = kernel;
  const entry = (address: PciAddress) => ({ address, socket: kernel.socket(address), mode: "server" as const });
  const failed: string[] = [];
  const vfs = [NOWHERE, PLAIN, VF].map((address) => ({ ...entry(address), uuid: UUID, unmanaged: true as const }));
  await addConfigured({ pfs: [NOWHERE, PF], vfs }, new Bus([join(kernel.directory, "bus")]), registry, {
    ...silentLogger,
    error: (message) => failed.push(message),
  });
  expect(steps.filter((step) => /^(open|attach)/.test(step))).toEqual([
    ...[`open ${PF}`, "attach cut off"],
    ...[`open ${VF}`, "attach cut off"],
    ...[`open ${PLAIN}`, "attach cut off"],
  ]);
  expect(registry.listVfs().map(({ vf }) => vf)).toEqual([VF, PLAIN]);
  expect(failed).toEqual([
    `PF ${NOWHERE} of the configuration could not be added`,
    `VF ${NOWHERE} of the configuration could not be added`,
  ]);
});
