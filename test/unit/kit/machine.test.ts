import { expect, test } from "bun:test";
import { mkdir, mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { moduleOrder } from "../../kit/guest/modules.ts";
import { machineArguments } from "../../kit/machine/command-line.ts";
import { describe } from "../../kit/machine/description.ts";
import { parseDmaFault } from "../../kit/machine/kernel-log.ts";
import { rejection } from "../../kit/rejection.ts";

const PATHS = { share: "/share", work: "/work", console: "/console" };
const IMAGE = { kernel: "/vmlinux", initramfs: "/initramfs" };

test("every function has a root port of its own, but for those that share a bridge", () => {
  const { functions } = describe({ kernel: "6.12", sriov: true });
  const alone = functions.filter(({ kind }) => kind !== "bridged").map(({ port }) => port);
  const bridged = functions.filter(({ kind }) => kind === "bridged").map(({ port }) => port);
  expect(new Set(alone).size).toBe(alone.length);
  expect(new Set(bridged).size).toBe(1);
  expect(alone).not.toContain(bridged[0]!);
});

test("a machine without SR-IOV has no PF and is for the installed QEMU", () => {
  const { functions, qemu } = describe({ kernel: "6.1", sriov: false });
  expect(functions.some(({ kind }) => kind === "sriov")).toBe(false);
  expect(qemu).toBe("system");
});

test("the IOMMU is the first device, and all functions are behind it", () => {
  const words = machineArguments(describe({ kernel: "6.12", sriov: true, addressBits: 39 }), IMAGE, PATHS, []);
  const devices = words.filter((_, index) => words[index - 1] === "-device");
  expect(devices[0]).toMatch(/^intel-iommu,.*aw-bits=39$/);
  const functions = devices.filter((device) => device.startsWith("{")).map((device) => JSON.parse(device));
  // Three disks, two cards, two disks behind the bridge, the PF with its four VFs.
  expect(functions).toHaveLength(12);
  for (const one of functions) expect(one.iommu_platform).toBe(true);
  const place = (id: string) => functions.findIndex((one) => one.id === id);
  expect(place("pf0v3")).toBeLessThan(place("pf0"));
});

test("a DMA fault is read from the kernel's log, of old kernels and new ones", () => {
  const line = "DMAR: [DMA Write NO_PASID] Request device [01:00.0] fault addr 0x1000 [fault reason 0x05] PTE Write";
  expect(parseDmaFault(line)).toEqual({
    operation: "write",
    address: "0000:01:00.0",
    iova: 0x1000n,
    reason: 5,
  });
  const segment =
    "DMAR: [DMA Read NO_PASID] Request device [0001:02:00.1] fault addr 0xffff0000 [fault reason 0x06] PTE";
  expect(parseDmaFault(segment)?.address).toBe("0001:02:00.1");
  expect(parseDmaFault("DMAR: DRHD: handling fault status reg 3")).toBeUndefined();
});

test("modules come after what they depend on; built-in ones are passed over, unknown ones are not", async () => {
  const folder = await mkdtemp(join(tmpdir(), "modules-"));
  try {
    await mkdir(join(folder, "kernel/drivers"), { recursive: true });
    await writeFile(join(folder, "kernel/drivers/upper-part.ko"), "\0depends=lower_part,crc\0");
    const packed = Bun.spawnSync(["xz", "--stdout"], { stdin: Buffer.from("\0depends=\0") });
    await writeFile(join(folder, "kernel/lower-part.ko.xz"), packed.stdout);
    await writeFile(join(folder, "modules.builtin"), "kernel/lib/crc.ko\n");
    const order = await moduleOrder(folder, ["upper_part", "crc"]);
    expect([...order.keys()]).toEqual(["lower_part", "upper_part"]);
    expect(Buffer.from(order.get("lower_part")!).toString()).toBe("\0depends=\0");
    expect((await rejection(moduleOrder(folder, ["nothing"]))).message).toContain("no module nothing");
  } finally {
    await rm(folder, { recursive: true, force: true });
  }
});
