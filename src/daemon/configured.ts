import type { Logger } from "../base/log.ts";
import { type Bus, takesToken } from "../pci/bus.ts";
import type { DaemonConfig } from "./config.ts";
import type { DeviceRegistry } from "./registry.ts";
import { vmOf } from "./vf-parts.ts";

type ConfiguredVf = DaemonConfig["vfs"][number];

/**
 * Adds what the configuration names: PFs, then VFs, side by side. Of one VM those that take a vf-token come first: all of
 * them share the interface of the first, and not every kernel takes tokens with iommufd. Settles when each was added or
 * its failure logged.
 */
export async function addConfigured(
  { pfs, vfs }: Pick<DaemonConfig, "pfs" | "vfs">,
  bus: Bus,
  registry: DeviceRegistry,
  log: Logger,
): Promise<void> {
  const each = async (what: string, adding: Promise<unknown>) => {
    try {
      await adding;
    } catch (error) {
      log.error(`${what} of the configuration could not be added`, error);
    }
  };
  const addVfs = async (some: readonly ConfiguredVf[]) => {
    await Promise.all(some.map((vf) => each(`VF ${vf.address}`, registry.addVf(vf))));
  };
  // Some are here from before a restart.
  const newPfs = pfs.filter((address) => !registry.hasPf(address));
  await Promise.all(newPfs.map((address) => each(`PF ${address}`, registry.addPf(address))));
  const newVfs = vfs.filter(({ address }) => !registry.hasVf(address));
  const ofEachVm = Map.groupBy(newVfs, vmOf).values().toArray();
  await Promise.all(
    ofEachVm.map(async (ofVm) => {
      const first = await withToken(ofVm, bus);
      await addVfs(ofVm.filter((vf) => first.has(vf)));
      await addVfs(ofVm.filter((vf) => !first.has(vf)));
    }),
  );
}

/** Those for which the kernel takes a vf-token. Functions that cannot be looked up are not: adding them says why. */
async function withToken(vfs: readonly ConfiguredVf[], bus: Bus): Promise<ReadonlySet<ConfiguredVf>> {
  const found = await Promise.all(
    vfs.map(async (vf) => {
      const entry = await bus.find(vf.address).catch(() => undefined);
      return entry !== undefined && takesToken(entry) ? [vf] : [];
    }),
  );
  return new Set(found.flat());
}
