import { VFIO_DRIVER_DIRECTORY } from "../functions.ts";
import type { Machine } from "../machine.ts";
import { bad, type Finding, ok, warn } from "./finding.ts";

/** What type 1 takes by default (drivers/vfio/vfio_iommu_type1.c); a region of guest memory is one entry or a few. */
const ENTRY_LIMIT = "/sys/module/vfio_iommu_type1/parameters/dma_entry_limit";
const ENTRIES_WANTED = 4096;

/** Modules or built-in parts of VFIO, and its files. */
export async function checkVfio(machine: Machine): Promise<Finding[]> {
  return [await checkDriver(machine), ...(await checkInterfaces(machine)), ...(await checkEntryLimit(machine))];
}

async function checkDriver(machine: Machine): Promise<Finding> {
  if (await machine.exists(VFIO_DRIVER_DIRECTORY)) return ok("vfio-pci", "there");
  const release = (await machine.text("/proc/sys/kernel/osrelease")) ?? "";
  const known = (await machine.text(`/lib/modules/${release}/modules.dep`)) ?? "";
  return /\/vfio-pci\.ko/.test(known)
    ? warn("vfio-pci", "its module is not loaded", "modprobe vfio-pci (`vfe-vhost-cli bind` does it)")
    : bad(
        "vfio-pci",
        "this kernel has no such module",
        "install the modules of this kernel, or a kernel with CONFIG_VFIO_PCI",
      );
}

async function checkInterfaces(machine: Machine): Promise<Finding[]> {
  const [container, iommufd, cdevs] = await Promise.all([
    machine.exists("/dev/vfio/vfio"),
    machine.exists("/dev/iommu"),
    machine.names("/dev/vfio/devices"),
  ]);
  const type1 = await machine.exists("/sys/module/vfio_iommu_type1");
  const findings: Finding[] = [];
  if (container && type1) findings.push(ok("VFIO groups", "/dev/vfio/vfio is there, with type 1"));
  else if (!iommufd) {
    const seen = container ? "type 1 is not loaded" : "there is no /dev/vfio/vfio";
    findings.push(bad("VFIO groups", seen, "modprobe -a vfio vfio_iommu_type1"));
  }
  if (iommufd) {
    const seen = `/dev/iommu is there; ${cdevs.length} functions have a file of their own`;
    findings.push(ok("iommufd", seen));
  } else {
    findings.push(ok("iommufd", "not there: groups are used"));
  }
  return findings;
}

async function checkEntryLimit(machine: Machine): Promise<Finding[]> {
  const limit = await machine.number(ENTRY_LIMIT);
  if (limit === undefined) return [];
  const seen = `${limit} DMA mappings a VM (dma_entry_limit)`;
  const fix = "options vfio_iommu_type1 dma_entry_limit=65535 in /etc/modprobe.d, then load the module again";
  return [limit < ENTRIES_WANTED ? warn("DMA mappings", seen, fix) : ok("DMA mappings", seen)];
}
