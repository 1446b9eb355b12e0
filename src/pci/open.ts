import type { AddressSpace } from "./address-space.ts";
import type { TransportKind } from "./bus.ts";
import { VfioAddressSpace, type VfioSettings } from "./vfio/address-space.ts";
import { VfioUserAddressSpace } from "./vfio-user/address-space.ts";

/** Makes an address space for functions of one transport. `owner` names it in the log: the VM, or the function. */
export type AddressSpaces = (kind: TransportKind, owner: string) => AddressSpace;

/** The address spaces of both transports. Without settings kernel VFIO is used as it is found, without a vf-token. */
export function addressSpaces(settings?: VfioSettings): AddressSpaces {
  return (kind, owner) => (kind === "vfio" ? new VfioAddressSpace(owner, settings) : new VfioUserAddressSpace());
}
