import { Deadline } from "../../../src/base/deadline.ts";
import { silentLogger } from "../../../src/base/log.ts";
import { KeeperClient } from "../../../src/keeper/keeper-client.ts";
import { parsePciAddress } from "../../../src/pci/address.ts";
import type { DmaRange } from "../../../src/pci/address-space.ts";
import { Bus } from "../../../src/pci/bus.ts";
import { VfioAddressSpace, type VfioInterface } from "../../../src/pci/vfio/address-space.ts";
import { DataPath } from "../../../src/virtio/data-path.ts";
import { decodeDeviceState } from "../../../src/virtio/device-state-codec.ts";
import { fakeClass } from "../fake-class.ts";

/**
 * `bun adoption-program.ts KEEPER-SOCKET group|iommufd PCI-ADDRESS kick|doorbell`: opens a function, maps the memory of the
 * guest whose record is in the keeper, runs its queue 0, puts what a successor needs, and waits to be killed.
 */
const [socket = "", wanted = "", address = "", way = "kick"] = process.argv.slice(2);
const deadline = Deadline.after(60_000, "the first process");
const client = await KeeperClient.connect(socket, deadline);
const guest = (await client.get("guest"))!;
const fd = (name: string) => guest.fds.get(name)!.number;
const { range, state } = guest.record as unknown as { readonly range: DmaRange; readonly state: string };
const settings = { interface: wanted as VfioInterface, token: async () => "", log: silentLogger };
const space = new VfioAddressSpace("a VM", settings);
const entry = await new Bus(["/sys/bus/pci/devices"]).find(parsePciAddress(address));
const fn = await space.open(entry!, deadline);
await space.attach(fn, [], deadline);
await space.map(range, fd("memory"), deadline);
const path = await DataPath.open(fn, (virtioId) => fakeClass({ virtioId }), deadline);
await path.start(
  decodeDeviceState(JSON.parse(state)),
  new Map([[0, { kick: fd("kick"), call: fd("call") }]]),
  deadline,
);
const page = way === "doorbell" ? path.shareDoorbell(0) : undefined;
const put = (key: string, { data, fds }: ReturnType<DataPath["snapshot"]>) =>
  client.put(key, () => ({ record: data, fds }));
await put("space", space.snapshot()!);
await put("function", fn.snapshot());
await put("path", path.snapshot());
const place = page === undefined ? null : { offset: page.offset, size: page.size };
await put("page", { data: place, fds: new Map(page === undefined ? [] : [["device", page.fd]]) });
client[Symbol.dispose]();
console.log("running");
await new Promise(() => {});
