import { afterAll, beforeAll, expect, test } from "bun:test";
import { mkdir, mkdtemp, rm, symlink } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { parsePciAddress } from "../../../src/pci/address.ts";
import { Bus } from "../../../src/pci/bus.ts";
import { rejection } from "../../kit/rejection.ts";

let directory = "";
const PF = parsePciAddress("5a:00.0");
const VF = parsePciAddress("5a:00.1");

beforeAll(async () => {
  directory = await mkdtemp(join(tmpdir(), "bus-"));
  const entry = async (address: string, device: string) => {
    await mkdir(join(directory, "soft", address), { recursive: true });
    await Bun.write(join(directory, "soft", address, "vendor"), "0x1af4\n");
    await Bun.write(join(directory, "soft", address, "device"), `${device}\n`);
    await Bun.write(join(directory, "soft", address, "class"), "0x010000\n");
  };
  await mkdir(join(directory, "empty"));
  await entry(PF, "0x1042");
  await entry(VF, "0x1042");
  for (let i = 0; i < 12; i++) {
    if (i === 3) continue;
    await symlink(`../0000:5a:0${Math.floor((i + 1) / 8)}.${(i + 1) % 8}`, join(directory, "soft", PF, `virtfn${i}`));
  }
  await symlink(`../${PF}`, join(directory, "soft", VF, "physfn"));
  await Bun.write(join(directory, "soft", VF, "vfio-user.sock"), "");
  await entry("0000:5a:1f.0", "rubbish");
});
afterAll(() => rm(directory, { recursive: true }));

test("functions are found by address, with their relations and transport", async () => {
  const bus = new Bus([join(directory, "missing"), join(directory, "empty"), join(directory, "soft")]);
  expect(await bus.find(parsePciAddress("00:00.0"))).toBeUndefined();
  expect(await bus.find(VF)).toMatchObject({
    vendor: 0x1af4,
    device: 0x1042,
    class: 0x010000,
    physfn: PF,
    virtfns: new Map(),
    transport: { kind: "vfio-user", socket: join(directory, "soft", VF, "vfio-user.sock") },
  });
  const pf = await bus.find(PF);
  expect(pf?.transport).toMatchObject({ kind: "vfio", driver: undefined, group: undefined, takesToken: false });
  expect(pf?.physfn).toBeUndefined();
  expect(pf?.virtfns.get(11)).toBe(parsePciAddress("5a:01.4"));
  // The index is that of the link, whether or not the others are there.
  expect([...(pf?.virtfns.keys() ?? [])]).toEqual([0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11]);
});

test("an attribute that is no number is named", async () => {
  const bus = new Bus([join(directory, "soft")]);
  expect((await rejection(bus.find(parsePciAddress("5a:1f.0")))).message).toMatch(/5a:1f.0\/device says "rubbish/);
});

/** A function of this machine, as sysfs has it. */
async function addKernelFunction(address: string, links: Readonly<Record<string, string>>): Promise<string> {
  const own = join(directory, "kernel", address);
  await mkdir(own, { recursive: true });
  const attributes = { vendor: "0x1af4\n", device: "0x1041\n", class: "0x020000\n", numa_node: "-1\n" };
  for (const [name, text] of Object.entries(attributes)) await Bun.write(join(own, name), text);
  for (const [name, target] of Object.entries(links)) {
    await mkdir(join(directory, target), { recursive: true });
    await symlink(join(directory, target), join(own, name));
  }
  return own;
}

test("a function of this machine has its driver, IOMMU group, cdev and NUMA node", async () => {
  const own = await addKernelFunction("0000:5b:00.0", { driver: "drivers/vfio-pci", iommu_group: "iommu_groups/12" });
  await mkdir(join(own, "vfio-dev/vfio3"), { recursive: true });
  await Bun.write(join(own, "numa_node"), "1\n");
  const found = await new Bus([join(directory, "kernel")]).find(parsePciAddress("5b:00.0"));
  const expected = { kind: "vfio", driver: "vfio-pci", group: 12, cdev: "vfio3", takesToken: false, numaNode: 1 };
  expect(found?.transport).toEqual(expected as NonNullable<typeof found>["transport"]);
});

test("PFs, and VFs whose PF has a driver of VFIO, take a vf-token", async () => {
  const bus = new Bus([join(directory, "kernel")]);
  const takesToken = async (address: string) => {
    const transport = (await bus.find(parsePciAddress(address)))?.transport;
    return transport?.kind === "vfio" && transport.takesToken;
  };
  const pf = await addKernelFunction("0000:5c:00.0", { driver: "drivers/mlx5_vfio_pci" });
  // Its driver may have lowered the number: it is a PF all the same.
  await Bun.write(join(pf, "sriov_totalvfs"), "0\n");
  await addKernelFunction("0000:5c:00.1", { physfn: "kernel/0000:5c:00.0" });
  await addKernelFunction("0000:5d:00.0", { driver: "drivers/virtio-pci" });
  await addKernelFunction("0000:5d:00.1", { physfn: "kernel/0000:5d:00.0" });
  expect(await takesToken("5c:00.0")).toBe(true);
  expect(await takesToken("5c:00.1")).toBe(true);
  expect(await takesToken("5d:00.0")).toBe(false);
  expect(await takesToken("5d:00.1")).toBe(false);
});

test("a group that the kernel has made up, without an IOMMU, is none", async () => {
  await addKernelFunction("0000:5e:00.0", { iommu_group: "iommu_groups/13" });
  const bus = new Bus([join(directory, "kernel")]);
  const find = () => bus.find(parsePciAddress("5e:00.0"));
  await Bun.write(join(directory, "iommu_groups/13/name"), "something\n");
  expect((await find())?.transport).toMatchObject({ group: 13 });
  await Bun.write(join(directory, "iommu_groups/13/name"), "vfio-noiommu\n");
  expect((await find())?.transport).toMatchObject({ group: undefined });
});
