import type { PciAddress } from "../pci/address.ts";
import { diskUses } from "./disk-uses.ts";
import { DEVICES } from "./functions.ts";
import type { Machine } from "./machine.ts";
import { routeUses } from "./route-uses.ts";

/**
 * What this machine would lose with a function's driver, a sentence each: file systems, swap, the way to the network; also
 * that of its VFs, which go with their PF.
 */
export async function usesOf(machine: Machine, address: PciAddress, vfs: Iterable<PciAddress> = []): Promise<string[]> {
  const uses = await Promise.all(
    [address, ...vfs].map(async (each) => {
      const directory = await machine.resolve(`${DEVICES}/${each}`);
      if (directory === undefined) return [];
      const [disks, routes] = await Promise.all([diskUses(machine, directory), routeUses(machine, directory)]);
      return [...disks, ...routes].map((use) => (each === address ? use : `its VF ${each}: ${use}`));
    }),
  );
  return uses.flat();
}
