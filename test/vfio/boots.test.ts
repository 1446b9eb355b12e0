import { expect, test } from "bun:test";
import { existsSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { release } from "node:os";
import { join } from "node:path";
import { watch } from "../../src/native/poller.ts";
import { eventfd, signalEventfd } from "../../src/native/sys.ts";
import { Machine } from "../kit/machine/inside.ts";

const machine = Machine.here();
const { kernel, sriov } = machine.description;
/** The end of a test's name where it needs VFs. */
const VFS = sriov ? "" : " [skip: this QEMU emulates no SR-IOV]";

test("the kernel is the one that was asked for", () => {
  expect(release()).toStartWith(kernel === "iommufd" ? "6.12." : `${kernel}.`);
  expect(existsSync("/dev/iommu")).toBe(kernel === "iommufd");
});

test("there is an IOMMU, and a group for each function; those behind the bridge share one", () => {
  expect(readdirSync("/sys/class/iommu")).toContain("dmar0");
  for (const kind of ["blk", "net", "sriov"] as const) {
    for (const one of machine.functions(kind)) expect(one.groupMembers).toEqual([one.address]);
  }
  const [first, second] = machine.functions("bridged");
  expect(first!.group).toBe(second!.group);
  expect(first!.groupMembers).toContain(second!.address);
});

test("vfio-pci takes a function and gives it back", () => {
  const blk = machine.function("blk0");
  {
    using _bound = blk.bind();
    expect(blk.driver).toBe("vfio-pci");
    expect(existsSync(`/dev/vfio/${blk.group}`)).toBe(true);
    expect(existsSync(`/dev/vfio/devices/${blk.vfioDevices[0]}`)).toBe(kernel === "iommufd");
  }
  expect(blk.driver).toBe("virtio-pci");
});

test.skipIf(!sriov)(`a PF that vfio-pci has makes VFs, each with a group of its own${VFS}`, async () => {
  writeFileSync("/sys/module/vfio_pci/parameters/enable_sriov", "Y");
  const pf = machine.function("pf0");
  using _bound = pf.bind();
  {
    using _vfs = await machine.enableVfs(pf, 4);
    expect(pf.vfs.map(({ driver }) => driver)).toEqual(Array(4).fill("vfio-pci"));
    expect(new Set(pf.vfs.map(({ group }) => group)).size).toBe(4);
  }
  expect(pf.vfs).toEqual([]);
});

test("a function is unplugged and plugged in again by QEMU, and the kernel says so", async () => {
  using log = machine.kernelLog();
  const blk = machine.function("blk1");
  await machine.unplug(blk);
  expect(() => machine.function("blk1")).toThrow("blk1 is not plugged");
  const again = await machine.plug(blk);
  expect(machine.function("blk1").address).toBe(again.address);
  expect(log.lines.some((line) => line.includes("pciehp"))).toBe(true);
  expect(log.dmaFaults()).toEqual([]);
});

test("QEMU says why it refuses a command", async () => {
  const refused = await machine.qmp("device_del", { id: "nobody" }).catch((error: Error) => error.message);
  expect(refused).toContain("nobody");
});

test("native code runs, by Bun's FFI and as a module with a thread", async () => {
  using fd = eventfd();
  const signalled = Promise.withResolvers<void>();
  using _watch = watch(fd.number, "in", signalled.resolve);
  signalEventfd(fd.number);
  await signalled.promise;
});

test("the files of the host can be changed inside", () => {
  const path = join(import.meta.dir, "../../package.json");
  const before = readFileSync(path, "utf8");
  writeFileSync(path, "{}");
  expect(readFileSync(path, "utf8")).toBe("{}");
  writeFileSync(path, before);
});

test("there are huge pages for whom wants them", () => {
  writeFileSync("/proc/sys/vm/nr_hugepages", "4");
  expect(readFileSync("/proc/sys/vm/nr_hugepages", "utf8").trim()).toBe("4");
  writeFileSync("/proc/sys/vm/nr_hugepages", "0");
});
