import type { Deadline } from "../base/deadline.ts";
import type { PciAddress } from "../pci/address.ts";
import type { Keeper } from "./keeper.ts";
import type { Vf } from "./vf.ts";
import { vfKey } from "./vf-parts.ts";

/** Milliseconds between two looks at who migrates now. */
const INTERVAL = 20;
/** Of the time for VFs that nobody keeps: what is left for removing them, milliseconds. */
const REMOVALS = 25_000;

/**
 * VMs that are being migrated lose nothing by the end of their VFs: each VF stops, and when its VMM has read what it has
 * written its session ends. VMs that begin to migrate meanwhile are waited for, too. Never rejects.
 * @param live those that are in service
 */
export async function leaveMigrations(live: () => readonly Vf[], deadline: Deadline): Promise<void> {
  const left = new Map<Vf, Promise<void>>();
  const none = () => {
    const migrating = live().filter((vf) => vf.isMigrating);
    for (const vf of migrating) if (!left.has(vf)) left.set(vf, vf.leaveMigration(deadline));
    return migrating.length === 0 || undefined;
  };
  await deadline.poll(none, INTERVAL).catch(() => {});
  await Promise.all(left.values());
}

/**
 * VFs of which the keeper has no record end as where nobody keeps anything, so that the others can be handed over. Never rejects.
 * @param devices `live`: those that are in service
 */
export async function endUnkept(
  devices: {
    readonly keeper: Keeper;
    readonly live: () => readonly Vf[];
    readonly remove: (address: PciAddress) => Promise<unknown>;
  },
  deadline: Deadline,
): Promise<void> {
  const { keeper, live, remove } = devices;
  // One that does not even answer takes nothing over.
  const listed = () => deadline.race(keeper.list()).catch(() => undefined);
  const without = (kept: ReadonlySet<string>) => live().filter(({ address }) => !kept.has(vfKey(address)));
  const before = await listed();
  if (before === undefined) return;
  const kept = new Set(before);
  await leaveMigrations(() => without(kept), deadline.before(REMOVALS));
  // Some have been stored meanwhile.
  const after = await listed();
  if (after === undefined) return;
  const unkept = without(new Set(after));
  await deadline.race(Promise.allSettled(unkept.map(({ address }) => remove(address)))).catch(() => {});
}
