import type { Machine } from "./machine.ts";

/** What has to stand on the kernel's command line, by the maker of the processor (/proc/cpuinfo). */
const COMMAND_LINES: Readonly<Record<string, string>> = {
  GenuineIntel: "intel_iommu=on iommu=pt",
  AuthenticAMD: "amd_iommu=on iommu=pt",
};

/** How this machine's IOMMU is switched on, as a sentence. */
export async function iommuFix(machine: Machine): Promise<string> {
  const vendor = await processorVendor(machine);
  const words = COMMAND_LINES[vendor ?? ""];
  if (words === undefined) return "switch the IOMMU on in the firmware, and start the kernel with it";
  return `switch the IOMMU (VT-d, AMD-Vi) on in the firmware, and start the kernel with ${words}`;
}

/** "GenuineIntel"; undefined on machines that are not x86. */
export async function processorVendor(machine: Machine): Promise<string | undefined> {
  const cpus = (await machine.text("/proc/cpuinfo")) ?? "";
  return /^vendor_id\s*:\s*(\S+)$/m.exec(cpus)?.[1];
}
