import { expect, test } from "bun:test";
import type { Json } from "../../../src/base/json.ts";
import { silentLogger } from "../../../src/base/log.ts";
import { leftVfInfo } from "../../../src/daemon/device-info.ts";
import { createMethods } from "../../../src/daemon/methods.ts";
import type { LeftVf } from "../../../src/daemon/presence.ts";
import { hollowRecord } from "../../../src/daemon/record.ts";
import { DeviceRegistry } from "../../../src/daemon/registry.ts";
import { vfKey } from "../../../src/daemon/vf-parts.ts";
import { parsePciAddress } from "../../../src/pci/address.ts";
import { Bus } from "../../../src/pci/bus.ts";
import { BUILT_IN_PLUGINS, PluginRegistry } from "../../../src/plugin-host.ts";
import type { Call } from "../../../src/rpc/method.ts";
import { MemoryKeeper } from "../../kit/memory-keeper.ts";
import { FakeDevices } from "../rpc/fake-devices.ts";

const PF = parsePciAddress("0000:5a:00.0");
const call: Call = { client: "test", log() {}, notify() {}, onClose() {} };

function leftVf(index: number, more: Partial<LeftVf["options"]> = {}, failed?: string): LeftVf {
  const address = parsePciAddress(`0000:5a:00.${index}`);
  const options = { address, socket: `/tmp/vf${index}`, mode: "client", ...more } as const;
  return { options, ...(failed === undefined ? {} : { failed }) };
}

async function ask(params: Readonly<Record<string, unknown>>): Promise<unknown[]> {
  const devices = new FakeDevices();
  await devices.addPf(PF);
  devices.listLeftVfs = () =>
    [leftVf(1, { uuid: "some" }), leftVf(2, { unmanaged: true }), leftVf(3, {}, "no such thing")].map(
      leftVfInfo,
    ) as unknown as [];
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

test("one that could not be attached anew is tried again after a restart, also where the keeper was another meanwhile", async () => {
  using keeper = new MemoryKeeper();
  let writeAll = async () => {};
  Object.assign(keeper, {
    onReturn(write: () => Promise<void>) {
      writeAll = write;
    },
  });
  const { options } = leftVf(1);
  const rings: Json = { open: [], lost: [[1, 2]] };
  const key = vfKey(options.address);
  await keeper.put(key, () => ({ record: hollowRecord(options, rings), fds: new Map() }));
  const plugins = await PluginRegistry.load({ builtIn: BUILT_IN_PLUGINS, plugins: [] }, silentLogger);
  const registry = new DeviceRegistry({ bus: new Bus([]), plugins, keeper, log: silentLogger });
  await registry.revive();
  expect(registry.listLeftVfs()).toMatchObject([{ vf: options.address, state: "failed" }]);
  await keeper.delete(key);
  await writeAll();
  expect(keeper.keys).toEqual([key]);
  expect((await keeper.get(key))?.record).toEqual({ ...hollowRecord(options, rings) });
});
