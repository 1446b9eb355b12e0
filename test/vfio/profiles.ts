import type { MachineOptions } from "../kit/machine/description.ts";

/** The machines that tests of this folder run in. */
export const PROFILES = {
  newest: { kernel: "6.12", sriov: true },
  /** Debian 12 as it is: its kernel and its QEMU, without SR-IOV. */
  oldest: { kernel: "6.1", sriov: false },
  /** The only one with iommufd and VFIO's character devices; its kernel is built by us, so it is not on every machine. */
  iommufd: { kernel: "iommufd", sriov: true },
} as const satisfies Readonly<Record<string, MachineOptions>>;
export type ProfileName = keyof typeof PROFILES;

/**
 * Files that other machines than the newest run, too; that one runs all. What depends on the kernel's interface is in them:
 * the rest would only make every run longer. "iommufd" runs all where it is asked for (`./dev test vfio --iommufd`).
 */
export const ALSO_IN: Readonly<Record<Exclude<ProfileName, "newest">, readonly string[]>> = {
  oldest: ["boots.test.ts", "address-space.test.ts", "function.test.ts"],
  iommufd: ["boots.test.ts", "address-space.test.ts", "function.test.ts", "blk.test.ts"],
};
