import { VhostdError } from "../base/errors.ts";
import type { PciAddress } from "../pci/address.ts";
import { describeHolders, findHolders } from "../pci/vfio/holders.ts";
import { findFunction, type MachineFunction } from "./functions.ts";
import type { Machine } from "./machine.ts";
import { usesOf } from "./uses.ts";

/** Functions that are not taken from those who use them: this machine itself, and processes. */

/** @param unless what takes it away all the same. @throws VhostdError busy */
export async function refuseUses(machine: Machine, fn: MachineFunction, unless: string | undefined): Promise<void> {
  const uses = await usesOf(machine, fn.address, fn.virtfns.values());
  if (uses.length === 0) return;
  throw new VhostdError("busy", `${fn.address} is in use by this machine: ${uses.join(", ")}`, {
    fix: `end that use first${unless === undefined ? "" : `; ${unless} takes the function away all the same`}`,
  });
}

/** A function that somebody has open: the kernel would wait until it is closed. @throws VhostdError busy */
export async function refuseHolders(
  machine: Machine,
  { address, transport }: MachineFunction,
  fix: string,
): Promise<void> {
  const { group, cdev } = transport;
  if (group === undefined) return;
  const file = `/dev/vfio/${group}`;
  const paths = cdev === undefined ? [file] : [file, `/dev/vfio/devices/${cdev}`];
  // A group is opened once only. Names are for people: anybody may have files that are called like these.
  if (!(await machine.isClaimed(file))) return;
  const holders = await findHolders(paths, address, machine.at("/proc"));
  const who = describeHolders(holders) ?? "held by a process that cannot be seen from here";
  throw new VhostdError("busy", `${address}, or its IOMMU group ${group}, is ${who}`, { fix });
}

/**
 * VFs that a process or this machine itself uses, and which go when their PF is changed.
 * @param unless what takes them away all the same
 * @throws VhostdError busy
 */
export async function refuseUsedVfs(machine: Machine, pf: MachineFunction, unless: string | undefined): Promise<void> {
  const forced = unless === undefined ? "" : `; ${unless} takes the VFs away as soon as they are closed`;
  for (const address of pf.virtfns.values()) {
    const vf = await findFunction(machine, address);
    await refuseUses(machine, vf, unless);
    await refuseHolders(machine, vf, holderFix(address) + forced);
  }
}

function holderFix(address: PciAddress): string {
  return `\`vfe-vhost-cli vf -r ${address}\`, or end that process`;
}
