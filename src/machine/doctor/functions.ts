import { type PciAddress, parsePciAddress } from "../../pci/address.ts";
import { isVfioDriver } from "../../pci/bus.ts";
import { findFunction, groupHindrance, type MachineFunction, virtioFunctions } from "../functions.ts";
import { iommuFix } from "../iommu.ts";
import type { Machine } from "../machine.ts";
import { ROOM_FIX } from "../sriov.ts";
import { ENABLE_SRIOV } from "../vfs.ts";
import { bad, type Finding, ok, warn } from "./finding.ts";

/** The lines of `resource` that are BARs of VFs (PCI_IOV_RESOURCES, linux/pci.h). */
const VF_BARS = { first: 7, end: 13 };

/** @param addresses those that are to be used; none: every virtio function, whoever is to use it */
export async function checkFunctions(machine: Machine, addresses: readonly PciAddress[]): Promise<Finding[]> {
  const findings: Finding[] = [];
  for (const address of addresses) {
    const fn = await findFunction(machine, address).catch((error: unknown) => error as Error);
    if (fn instanceof Error) findings.push(bad(address, fn.message, "`lspci -D` lists what this machine has"));
    else findings.push(...(await checkFunction(machine, fn, true)));
  }
  if (addresses.length > 0) return findings;
  const all = await virtioFunctions(machine);
  for (const fn of all) findings.push(...(await checkFunction(machine, fn, false)));
  if (all.length === 0) {
    findings.push(
      warn("functions", "this machine has no virtio function", "switch PFs with SR-IOV on in the card's configuration"),
    );
  }
  return findings;
}

/** @param wanted the daemon is to use it: whatever hinders that is bad */
async function checkFunction(machine: Machine, fn: MachineFunction, wanted: boolean): Promise<Finding[]> {
  const { address, path } = fn;
  const { driver, group } = fn.transport;
  const findings: Finding[] = [];
  const isBound = driver !== undefined && isVfioDriver(driver);
  const has = driver === undefined ? "it has no driver" : `${driver} has it`;
  if (group === undefined && wanted) {
    findings.push(bad(address, "it has no IOMMU group: its DMA could not be confined", await iommuFix(machine)));
  } else if (isBound) findings.push(ok(address, `bound to ${driver}, IOMMU group ${group}`));
  else if (wanted) findings.push(bad(address, `${has}, not vfio-pci`, `vfe-vhost-cli bind ${address}`));
  else findings.push(ok(address, group === undefined ? `${has}, without an IOMMU group` : has));
  const hindrance = wanted || isBound ? await groupHindrance(machine, path) : undefined;
  if (hindrance !== undefined) {
    findings.push(
      bad(address, `IOMMU group ${group} cannot be opened: drivers have ${hindrance.names}`, hindrance.fix),
    );
  }
  return [...findings, ...(await checkSriov(machine, fn))];
}

async function checkSriov(machine: Machine, fn: MachineFunction): Promise<Finding[]> {
  const { address, path } = fn;
  const total = (await machine.number(`${path}/sriov_totalvfs`)) ?? 0;
  if (total === 0) return [];
  const count = (await machine.number(`${path}/sriov_numvfs`)) ?? 0;
  const check = `${address} SR-IOV`;
  const findings = [ok(check, `${count} of ${total} VFs`)];
  const enabled = await machine.text(ENABLE_SRIOV);
  if (isVfioDriver(fn.transport.driver ?? "") && enabled === "N" && count === 0) {
    findings.push(warn(check, "vfio-pci's enable_sriov is N", `vfe-vhost-cli sriov ${address} N switches it on`));
  }
  if ((await vfBarsWithoutPlace(machine, path)) > 0) {
    findings.push(bad(check, "the kernel has found no addresses for the BARs of its VFs", ROOM_FIX));
  }
  const beyond = await vfsBeyondBus(machine, path, address, total);
  if (beyond > 0) {
    const seen = `${beyond} of ${total} VFs would lie on bus numbers that its bridge does not have`;
    findings.push(beyond === total ? bad(check, seen, ROOM_FIX) : warn(check, seen, ROOM_FIX));
  }
  return findings;
}

/** BARs that have a size in the card (their flags say what they are), and no address. */
async function vfBarsWithoutPlace(machine: Machine, path: string): Promise<number> {
  const rows = (await machine.lines(`${path}/resource`)).slice(VF_BARS.first, VF_BARS.end);
  return rows.filter((row) => {
    const [start, , flags] = row.split(" ").map(BigInt);
    return start === 0n && flags !== 0n;
  }).length;
}

/** VFs whose routing id is beyond the last bus number of the bridge above (PCIe 9.3.3.3). */
async function vfsBeyondBus(machine: Machine, path: string, address: PciAddress, total: number): Promise<number> {
  const [offset, stride, resolved] = await Promise.all([
    machine.number(`${path}/sriov_offset`),
    machine.number(`${path}/sriov_stride`),
    machine.resolve(path),
  ]);
  const last = await machine.number(`${resolved ?? ""}/../subordinate_bus_number`);
  if (offset === undefined || stride === undefined || last === undefined) return 0;
  const [, bus = "0", device = "0", fn = "0"] = parsePciAddress(address).split(/[:.]/);
  const own = (Number.parseInt(bus, 16) << 8) | (Number.parseInt(device, 16) << 3) | Number(fn);
  const buses = Array.from({ length: total }, (_, index) => (own + offset + stride * index) >> 8);
  return buses.filter((each) => each > last).length;
}
