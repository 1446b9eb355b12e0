import type { Machine } from "./machine.ts";
import type { Step } from "./steps.ts";

/**
 * Whether vfio-pci lets a PF have VFs: a parameter of its module, which can be changed while it is there. Off, the number of
 * VFs cannot be written, not even none.
 */
export const ENABLE_SRIOV = "/sys/module/vfio_pci/parameters/enable_sriov";

/**
 * Sets how many VFs a PF has (Linux, Documentation/PCI/pci-iov-howto.rst).
 * @param pf its directory. The kernel goes from none to some and back, never from some to others
 */
export function vfNumberStep(pf: string, count: number): Step {
  return valueStep(`${pf}/sriov_numvfs`, String(count));
}

/** Writes what an attribute then says. */
export function valueStep(path: string, value: string): Step {
  const check = async (machine: Machine) => {
    const seen = await machine.text(path);
    return seen === value ? undefined : `${path} says ${JSON.stringify(seen)}`;
  };
  return { path, value, check };
}
