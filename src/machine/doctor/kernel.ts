import { iommuFix, processorVendor } from "../iommu.ts";
import type { Machine } from "../machine.ts";
import { bad, type Finding, ok, warn } from "./finding.ts";

/** vfio-pci has SR-IOV from here on. */
const SRIOV_KERNEL = [5, 7] as const;
/**
 * Commit ffed0518d871 ("vfio: remove useless judgement"), first in 6.0: a process may unmap what another one has mapped.
 * A daemon that continues after a crash has to.
 */
const HA_KERNEL = [6, 0] as const;

/** Kernel version. */
export async function checkKernel(machine: Machine): Promise<Finding[]> {
  const release = (await machine.text("/proc/sys/kernel/osrelease")) ?? "";
  const [, major, minor] = /^(\d+)\.(\d+)/.exec(release) ?? [];
  if (major === undefined || minor === undefined) {
    return [warn("kernel", `its version "${release}" cannot be read`, "compare it with 6.0 yourself")];
  }
  const isSince = ([wantedMajor, wantedMinor]: readonly [number, number]) =>
    Number(major) > wantedMajor || (Number(major) === wantedMajor && Number(minor) >= wantedMinor);
  const findings: Finding[] = isSince(SRIOV_KERNEL)
    ? [ok("kernel", `${release}: vfio-pci has SR-IOV (since 5.7)`)]
    : [bad("kernel", `${release}: vfio-pci has no SR-IOV before 5.7`, "use a newer kernel")];
  const fix = "use kernel 6.0 or later, or one of a distribution that has that commit; all but HA works without it";
  findings.push(
    isSince(HA_KERNEL)
      ? ok("kernel, HA", `${release} has the fix that vfe-vhostd-ha needs (ffed0518d871, judged by version: since 6.0)`)
      : warn("kernel, HA", `${release} lacks the fix that vfe-vhostd-ha needs (ffed0518d871, by version)`, fix),
  );
  return findings;
}

/** IOMMU and interrupt remapping. */
export async function checkIommu(machine: Machine): Promise<Finding[]> {
  const [units, groups, commandLine = ""] = await Promise.all([
    machine.names("/sys/class/iommu"),
    machine.names("/sys/kernel/iommu_groups"),
    machine.text("/proc/cmdline"),
  ]);
  if (groups.length === 0) {
    const words = commandLine.split(" ").filter((word) => word.includes("iommu"));
    const seen = `off: there are no IOMMU groups (kernel command line: ${words.join(" ") || "nothing about it"})`;
    return [bad("IOMMU", seen, await iommuFix(machine))];
  }
  const unit = units.length === 0 ? "an IOMMU" : units.join(", ");
  const findings = [ok("IOMMU", `on: ${unit}, ${groups.length} groups`)];
  if ((await machine.text("/sys/module/vfio/parameters/enable_unsafe_noiommu_mode")) === "Y") {
    const fix = "echo N > /sys/module/vfio/parameters/enable_unsafe_noiommu_mode";
    findings.push(warn("IOMMU", "VFIO's mode without IOMMU is allowed; the daemon does not use it", fix));
  }
  if ((await processorVendor(machine)) !== undefined) findings.push(await checkInterruptRemapping(machine));
  return findings;
}

async function checkInterruptRemapping(machine: Machine): Promise<Finding> {
  const check = "interrupt remapping";
  // The names of remapped interrupt chips of x86 begin so.
  if (/\bIR-/.test((await machine.text("/proc/interrupts")) ?? "")) return ok(check, "on");
  if ((await machine.text("/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts")) === "Y") {
    const fix = "switch it on in the firmware (x2APIC, VT-d): a guest could send this machine any interrupt";
    return warn(check, "off, and VFIO is told to do without (allow_unsafe_interrupts)", fix);
  }
  const fix = "switch it on in the firmware and take intremap=off, nox2apic away from the kernel's command line";
  return bad(check, "off: VFIO refuses functions without it", fix);
}
