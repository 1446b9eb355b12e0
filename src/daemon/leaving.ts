import type { Deadline } from "../base/deadline.ts";
import type { Vf } from "./vf.ts";

/** Milliseconds between two looks at who migrates now. */
const INTERVAL = 20;

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
