import { VhostdError } from "../base/errors.ts";
import type { Json } from "../base/json.ts";
import type { PciAddress } from "../pci/address.ts";
import { type BusEntry, takesToken } from "../pci/bus.ts";
import type { Vf } from "./vf.ts";
import type { VfOptions } from "./vf-parts.ts";

/** A slot is taken as soon as an add begins, so that two adds of one address cannot meet. */
export type Slot<T> = { readonly live: T } | "adding" | "removing";

/** A VF of an earlier process: it waits to be taken up again, or cannot be. */
export interface LeftVf {
  readonly options: VfOptions;
  /** Why it cannot be. */
  readonly failed?: string;
  /** Where whoever comes after this process attaches it anew: what its device has not given back. */
  readonly again?: Json;
}

export interface VfSlot {
  slot: Slot<Vf> | { readonly left: LeftVf };
  readonly socket: string;
  /** The PF that it is a VF of; undefined for a function that is none. */
  readonly pf: PciAddress | undefined;
}

/** Why a function cannot be added: it is not closed yet. @param what "VF 0000:5a:00.1" */
export function stillClosing(what: string): VhostdError {
  return new VhostdError("busy", `${what} is still being removed: its kernel resets and closes it`, {
    fix: "try again later; a function that does not answer keeps the kernel busy for a minute or two",
  });
}

/** What is in service under an address, or undefined. */
export function liveOf<T>(slot: Slot<T> | { readonly left: LeftVf }): T | undefined {
  return typeof slot === "object" && "live" in slot ? slot.live : undefined;
}

/** What an earlier process has left under an address, or undefined. */
export function leftOf(slot: VfSlot["slot"]): LeftVf | undefined {
  return typeof slot === "object" && "left" in slot ? slot.left : undefined;
}

/**
 * What is there under an address.
 * @param what "VF 0000:5a:00.1"
 * @throws VhostdError busy where it comes or goes just now; vfRestoring, noDevice where an earlier process has left it
 */
export function liveIn<T>(slot: Slot<T> | { readonly left: LeftVf }, what: string): T {
  if (typeof slot === "object" && "live" in slot) return slot.live;
  if (typeof slot === "object") throw notTakenUp(slot.left, what);
  throw new VhostdError("busy", `${what} is ${slot === "adding" ? "being added" : "being removed"}`);
}

function notTakenUp({ failed, options }: LeftVf, what: string): VhostdError {
  if (failed !== undefined) {
    return new VhostdError("noDevice", `${what} could not be taken up after a restart: ${failed}`, {
      fix: `remove it, then add it again: vfe-vhost-cli vf -r ${options.address}`,
    });
  }
  return new VhostdError("vfRestoring", `${what} waits to be taken up after a restart`, {
    fix: "try again in a moment",
  });
}

/** Why a VF should not be removed: the session of its front-end would end too early. */
export function vfMigrating(address: PciAddress): VhostdError {
  return new VhostdError("busy", `VF ${address} is in use by a VM that is being migrated`, {
    fix: "wait for the end of the migration, or cancel it in the VMM; --force removes it all the same, and a VM that arrives then may lack what the VF has written",
  });
}

/** Why a VF cannot be added: it is there. */
export function vfExists(address: PciAddress, slot: VfSlot["slot"] | undefined): VhostdError {
  if (slot === "removing") return stillClosing(`VF ${address}`);
  const failed = typeof slot === "object" ? failureOf(slot) : undefined;
  if (failed !== undefined) {
    return new VhostdError("vfExists", `VF ${address} has been added already, and has failed: ${failed}`, {
      fix: `remove it, then add it again: vfe-vhost-cli vf -r ${address}`,
    });
  }
  return new VhostdError("vfExists", `VF ${address} has been added already`, {
    fix: `nothing is to be done, or remove it first: vfe-vhost-cli vf -r ${address}`,
  });
}

function failureOf(slot: { readonly live: Vf } | { readonly left: LeftVf }): string | undefined {
  if ("left" in slot) return slot.left.failed;
  return slot.live.state.name === "failed" ? (slot.live.reason ?? "") : undefined;
}

/** Why there is no such VF. */
export function vfMissing(address: PciAddress): VhostdError {
  return new VhostdError("vfNotFound", `VF ${address} has not been added`, {
    fix: `add it with "vfe-vhost-cli vf -a ${address}"; "vf -l" lists those of a PF`,
  });
}

/** Why a VF cannot be added: its PF is not there. */
export function parentMissing(vf: BusEntry, pf: PciAddress): VhostdError {
  // vfio-pci gives a PF that nobody has opened yet a random token: its VFs cannot be opened before it.
  const more = takesToken(vf)
    ? " first (it may be removed again afterwards)"
    : "; or add the VF without its PF, with --unmanaged";
  return new VhostdError("pfNotFound", `PF ${pf} has not been added`, { fix: `vfe-vhost-cli mgmtpf -a ${pf}${more}` });
}

/**
 * Why there is no such PF.
 * @param parent where it is a VF: its PF, which is in service
 * @param served without a PF: the function itself, or a VF of it
 */
export function pfMissing(
  address: PciAddress,
  parent: PciAddress | undefined,
  served: PciAddress | undefined,
): VhostdError {
  if (parent !== undefined) {
    return new VhostdError("pfNotFound", `${address} is a VF of PF ${parent}`, { fix: `name the PF, ${parent}` });
  }
  if (served !== undefined) {
    const who = served === address ? address : `VF ${served} of ${address}`;
    return new VhostdError("pfNotFound", `${who} is served without a PF`, {
      fix: `vfe-vhost-cli vf -i ${served}, or vf -l --unmanaged`,
    });
  }
  return new VhostdError("pfNotFound", `PF ${address} has not been added`, {
    fix: `vfe-vhost-cli mgmtpf -a ${address}`,
  });
}
