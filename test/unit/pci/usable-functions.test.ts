import { afterAll, beforeAll, expect, test } from "bun:test";
import { mkdir, mkdtemp, rm, symlink } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { Deadline } from "../../../src/base/deadline.ts";
import { SystemError, VhostdError } from "../../../src/base/errors.ts";
import { liveFds } from "../../../src/native/fd.ts";
import { eventfd } from "../../../src/native/sys.ts";
import { parsePciAddress } from "../../../src/pci/address.ts";
import { isVfioDriver } from "../../../src/pci/bus.ts";
import { VfioAddressSpace } from "../../../src/pci/vfio/address-space.ts";
import { hinderingNeighbours, neighboursOf } from "../../../src/pci/vfio/group-neighbours.ts";
import type { KernelEntry } from "../../../src/pci/vfio/iommu.ts";
import { tokenError, viabilityError, whileBusy } from "../../../src/pci/vfio/opening.ts";
import { rejection } from "../../kit/rejection.ts";

let sysfs = "";
const ADDRESS = parsePciAddress("5a:00.0");
const EPERM = 1;
const EBUSY = 16;

beforeAll(async () => {
  sysfs = await mkdtemp(join(tmpdir(), "sysfs-"));
  for (const driver of ["vfio-pci", "virtio-pci", "pcieport", "shpchp", "mlx5_vfio_pci"]) {
    await mkdir(join(sysfs, "drivers", driver), { recursive: true });
  }
  await mkdir(join(sysfs, "group"), { recursive: true });
  const member = async (address: string, driver: string | undefined, pciClass = "0x020000\n") => {
    await mkdir(join(sysfs, address));
    await Bun.write(join(sysfs, address, "class"), pciClass);
    await symlink(join(sysfs, "group"), join(sysfs, address, "iommu_group"));
    if (driver !== undefined) await symlink(join(sysfs, "drivers", driver), join(sysfs, address, "driver"));
    await mkdir(join(sysfs, "group/devices"), { recursive: true });
    await symlink(join(sysfs, address), join(sysfs, "group/devices", address));
  };
  await member(ADDRESS, "vfio-pci");
  await member("0000:5a:00.1", "virtio-pci");
  await member("0000:5a:00.2", undefined);
  await member("0000:5a:00.3", "pcieport", "0x060400\n");
  await member("0000:5a:00.4", "mlx5_vfio_pci");
  await mkdir(join(sysfs, "0000:5a:00.4/vfio-dev/vfio7"), { recursive: true });
  await member("0000:5a:01.0", "shpchp", "0x060401\n");
});
afterAll(() => rm(sysfs, { recursive: true }));

function entry(transport: Partial<KernelEntry["transport"]> = {}, address = ADDRESS): KernelEntry {
  const kernel = {
    kind: "vfio",
    driver: "vfio-pci",
    group: 4242,
    cdev: undefined,
    takesToken: false,
    numaNode: undefined,
  };
  return {
    address,
    directory: join(sysfs, address),
    vendor: 0x1af4,
    device: 0x1042,
    class: 0,
    physfn: undefined,
    virtfns: new Map(),
    transport: { ...kernel, ...transport } as KernelEntry["transport"],
  };
}

/** A function without neighbours. */
function alone(): KernelEntry {
  return entry({}, parsePciAddress("5b:00.0"));
}

function soon(): Deadline {
  return Deadline.after(400, "opening");
}

async function refusal(refused: KernelEntry): Promise<VhostdError> {
  const space = new VfioAddressSpace("a VM");
  const error = await rejection(space.open(refused, soon()));
  space[Symbol.dispose]();
  expect(error).toBeInstanceOf(VhostdError);
  return error as VhostdError;
}

test("vfio-pci and its variants are drivers of VFIO", () => {
  for (const driver of ["vfio-pci", "mlx5_vfio_pci", "virtio_vfio_pci"]) expect(isVfioDriver(driver)).toBe(true);
  for (const driver of ["virtio-pci", "vfio-platform", "novfio-pcix", "xvfio-pci"])
    expect(isVfioDriver(driver)).toBe(false);
});

test("the group's other devices are found, and those whose drivers are in the way", async () => {
  const neighbours = await neighboursOf(join(sysfs, ADDRESS));
  expect(neighbours).toEqual([
    { address: "0000:5a:00.1", driver: "virtio-pci", bridge: false, cdev: undefined },
    { address: "0000:5a:00.2", driver: undefined, bridge: false, cdev: undefined },
    { address: "0000:5a:00.3", driver: "pcieport", bridge: true, cdev: undefined },
    { address: "0000:5a:00.4", driver: "mlx5_vfio_pci", bridge: false, cdev: "vfio7" },
    { address: "0000:5a:01.0", driver: "shpchp", bridge: true, cdev: undefined },
  ]);
  expect(hinderingNeighbours(neighbours).map(({ address }) => address)).toEqual(["0000:5a:00.1", "0000:5a:01.0"]);
  expect(await neighboursOf(join(sysfs, "0000:5a:1f.0"))).toEqual([]);
});

test("a group that another driver has a part of names the function and the driver", async () => {
  const error = await viabilityError(entry());
  expect(error?.code).toBe("iommuGroup");
  expect(error?.message).toContain("0000:5a:00.1 (driver virtio-pci)");
  expect(error?.message).toContain("0000:5a:01.0 (driver shpchp)");
  expect(error?.fix).toContain(
    "vfe-vhost-cli bind 0000:5a:00.1, and echo 0000:5a:01.0 > /sys/bus/pci/drivers/shpchp/unbind",
  );
});

test("a function of another driver, or of none, is refused with the command that binds it", async () => {
  for (const driver of ["virtio-pci", undefined]) {
    const error = await refusal(entry({ driver }));
    expect(error.code).toBe("iommuGroupBind");
    expect(error.message).toContain(driver ?? "no driver");
    expect(error.fix).toContain(`vfe-vhost-cli bind ${ADDRESS}`);
  }
});

test("a function that no IOMMU keeps apart is refused", async () => {
  const error = await refusal(entry({ group: undefined }));
  expect(error.code).toBe("iommuGroup");
  expect(error.fix).toContain("intel_iommu=on");
});

test("what is busy is tried again, and works once it is not", async () => {
  let tries = 0;
  const attempt = async () => {
    if (++tries < 3) throw new SystemError("open", EBUSY);
    return "opened";
  };
  expect(await whileBusy(alone(), [EBUSY], soon(), attempt)).toBe("opened");
});

test("what stays busy is said to be; other errors are not tried again", async () => {
  const busy = await rejection(
    whileBusy(alone(), [EBUSY], soon(), () => Promise.reject(new SystemError("open", EBUSY))),
  );
  expect(busy).toMatchObject({ code: "busy" });
  expect(busy.message).toContain("5b:00.0");
  let tries = 0;
  const attempt = async () => {
    tries++;
    throw new SystemError("open", 22);
  };
  expect(await rejection(whileBusy(alone(), [EBUSY], soon(), attempt))).toMatchObject({ errno: 22 });
  expect(tries).toBe(1);
});

test("another driver in the group ends the tries at once; what the kernel calls forbidden may be busy, or unsafe", async () => {
  const refused = (errno: number) => () => Promise.reject(new SystemError("bind", errno));
  expect(await rejection(whileBusy(entry(), [EBUSY], soon(), refused(EBUSY)))).toMatchObject({ code: "iommuGroup" });
  const unsafe = await rejection(whileBusy(alone(), [EPERM], soon(), refused(EPERM)));
  expect(unsafe.message).toContain("does not remap interrupts");
});

test("a refused vf-token is explained for a VF and for a PF", () => {
  const physfn = parsePciAddress("59:00.0");
  const ofVf = tokenError({ ...entry(), physfn }, undefined);
  expect(ofVf.message).toMatch(/vf-token.*59:00\.0/);
  expect(ofVf.fix).toContain(physfn);
  expect(tokenError(entry(), undefined).message).toContain("its VFs are open with another vf-token");
});

test("nothing is mapped before a function is open, and none is revived; its fds are let go", async () => {
  using space = new VfioAddressSpace("a VM");
  expect(space.ioRanges).toEqual([]);
  const range = { iova: 0, size: 4096, offset: 0, file: { dev: 0, ino: 0 } };
  expect((await rejection(space.map(range, 0, soon()))).message).toContain("no function of a VM was opened");
  const before = liveFds();
  expect(() => space.revive(entry(), {}, new Map([["device", eventfd()]]))).toThrow("no function of a VM was opened");
  expect(liveFds()).toBe(before);
});
