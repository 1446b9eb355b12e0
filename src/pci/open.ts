import { VhostdError } from "../base/errors.ts";
import type { AddressSpace, StoredSpace } from "./address-space.ts";
import type { TransportKind } from "./bus.ts";
import { VfioAddressSpace, type VfioSettings } from "./vfio/address-space.ts";
import { VfioUserAddressSpace } from "./vfio-user/address-space.ts";

/**
 * Makes an address space for functions of one transport. `owner` names it in the log: the VM, or the function.
 * @param stored of an earlier process, which it goes on with: mapped, without a word to anyone. Takes its fds
 * @throws VhostdError invalid where that is not understood
 */
export type AddressSpaces = (kind: TransportKind, owner: string, stored?: StoredSpace) => AddressSpace;

/** The address spaces of both transports. Without settings kernel VFIO is used as it is found, without a vf-token. */
export function addressSpaces(settings?: VfioSettings): AddressSpaces {
  return (kind, owner, stored) => {
    if (kind === "vfio") {
      return stored === undefined
        ? new VfioAddressSpace(owner, settings)
        : VfioAddressSpace.revive(owner, stored, settings);
    }
    if (stored === undefined) return new VfioUserAddressSpace();
    for (const fd of stored.fds.values()) fd[Symbol.dispose]();
    throw new VhostdError("invalid", `nothing is kept of an address space over vfio-user; one of ${owner} is stored`);
  };
}
