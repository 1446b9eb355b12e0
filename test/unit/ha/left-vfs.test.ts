import { expect, test } from "bun:test";
import { silentLogger } from "../../../src/base/log.ts";
import { type LeftVfInfo, leftVfInfo } from "../../../src/daemon/device-info.ts";
import { createMethods } from "../../../src/daemon/methods.ts";
import type { LeftVf } from "../../../src/daemon/presence.ts";
import { parsePciAddress } from "../../../src/pci/address.ts";
import type { Call } from "../../../src/rpc/method.ts";
import { FakeDevices } from "../rpc/fake-devices.ts";

const PF = parsePciAddress("0000:5a:00.0");
const call: Call = { client: "test", log() {}, notify() {}, onClose() {} };

function left(index: number, more: Partial<LeftVf["options"]> = {}, failed?: string): LeftVfInfo {
  const address = parsePciAddress(`0000:5a:00.${index}`);
  const options = { address, socket: `/tmp/vf${index}`, mode: "client", ...more } as const;
  return leftVfInfo({ options, ...(failed === undefined ? {} : { failed }) });
}

async function ask(params: Readonly<Record<string, unknown>>): Promise<unknown[]> {
  const devices = new FakeDevices();
  await devices.addPf(PF);
  devices.listLeftVfs = () =>
    [left(1, { uuid: "some" }), left(2, { unmanaged: true }), left(3, {}, "no such thing")] as unknown as [];
  const method = createMethods(devices, silentLogger).find(({ name }) => name === "vf")!;
  return ((await method.invoke(params, call)) as { devices: unknown[] }).devices;
}

test("old clients see of VFs that wait what is known of them", async () => {
  expect(await ask({ list: true, mgmtpf: PF })).toEqual([
    { vf: "0000:5a:00.1", probed: false, vm_uuid: "some", socket_file: "/tmp/vf1" },
    { vf: "0000:5a:00.2", probed: false, vm_uuid: "", socket_file: "/tmp/vf2" },
    { vf: "0000:5a:00.3", probed: false, vm_uuid: "", socket_file: "/tmp/vf3", reason: "no such thing" },
  ]);
});

test("those of a PF that wait are none that were added without a PF", async () => {
  for (const request of [{ unmanaged: true }, { unmanaged: true, mgmtpf: PF }]) {
    expect(await ask({ list: true, ...request })).toMatchObject([{ vf: "0000:5a:00.2" }]);
  }
});
