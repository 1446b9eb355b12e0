import type { PciAddress } from "../pci/address.ts";

/** Where the vhost-user socket of a VF is expected when nobody says otherwise. */
export function defaultSocket(address: PciAddress): string {
  return `/tmp/vf-${address}`;
}
