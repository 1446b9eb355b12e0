import type { MachineOptions } from "../kit/machine/description.ts";

/**
 * The machines that tests of this folder run in. With one processor each, two of them share the cores of a small host best:
 * of two, one waits for the other most of the time.
 */
export const PROFILES = {
  newest: { kernel: "6.12", sriov: true, processors: 1 },
  /** Debian 12 as it is: its kernel and its QEMU, without SR-IOV. */
  oldest: { kernel: "6.1", sriov: false, processors: 2 },
  /** The only one with iommufd and VFIO's character devices; its kernel is built by us, so it is not on every machine. */
  iommufd: { kernel: "iommufd", sriov: true, processors: 1 },
} as const satisfies Readonly<Record<string, MachineOptions>>;
export type ProfileName = keyof typeof PROFILES;

/**
 * Files that other machines than the newest run, too; that one runs all. What depends on the kernel's interface is in them:
 * the rest would only make every run longer. "iommufd" runs all where it is asked for (`./dev test vfio --iommufd`).
 */
export const ALSO_IN: Readonly<Record<Exclude<ProfileName, "newest">, readonly string[]>> = {
  oldest: ["boots.test.ts", "function.test.ts"],
  iommufd: ["boots.test.ts", "address-space.test.ts", "adoption.test.ts", "blk.test.ts", "ha-kill.test.ts"],
};

/** The same, of a long run (`./dev test vfio --long`): beside those. */
export const ALSO_IN_LONG: typeof ALSO_IN = {
  oldest: ["address-space.test.ts", "adoption.test.ts", "ha-kill.test.ts"],
  iommufd: ["function.test.ts"],
};

/** Processors of every machine in a long run: there, two of a machine meet in its kernel. */
export const LONG_PROCESSORS = 2;

/** Files that take the most time, the longest first. A machine that begins one at the end keeps all others waiting. */
export const LONGEST = [
  "ha-kill.test.ts",
  "guest.test.ts",
  "dma-safety.test.ts",
  "notifier.test.ts",
  "crash.test.ts",
  "renewal.test.ts",
  "bind.test.ts",
  "commands.test.ts",
  "lent.test.ts",
  "unplug.test.ts",
  "net.test.ts",
  "token.test.ts",
  "domains.test.ts",
  "group.test.ts",
];
