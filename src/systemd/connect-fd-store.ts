import type { Logger } from "../base/log.ts";
import { CloseLane, OwnedFd } from "../native/fd.ts";
import { compareFiles } from "../native/file-order.ts";
import { eventfd } from "../native/sys.ts";
import { closeAll, FdStore, isStoreName } from "./fd-store.ts";
import type { ServiceEnvironment } from "./service-environment.ts";

/** The number of the first fd that is handed over (sd_listen_fds(3)). */
const FIRST_LISTEN_FD = 3;

/**
 * The fd store that systemd has for this service, with what an earlier process has left there. To be called once, also
 * where the store is not used: what is left is closed and removed then.
 * @param max fds, FileDescriptorStoreMax= of the service, where systemd does not say it (before version 254); 0: the store
 *   is not used whatever it says
 * @returns undefined where there is none, or where nobody knows its size
 * @throws SystemError where systemd is not there, or the kernel has no kcmp(2)
 */
export async function connectFdStore(
  { notifySocket, fdStoreMax, listenNames }: ServiceEnvironment,
  log: Logger,
  max?: number,
): Promise<FdStore | undefined> {
  using undo = new DisposableStack();
  const handed = undo.adopt(takeHanded(listenNames), closeAll);
  const most = max === 0 ? 0 : (fdStoreMax ?? max ?? 0);
  if (notifySocket === undefined || (most === 0 && handed.size === 0)) return undefined;
  // Better now than when the first record is to be stored.
  using probe = eventfd();
  compareFiles(probe.number, probe.number);
  undo.move();
  const store = await FdStore.open({ address: notifySocket, max: most, log }, handed);
  if (most > 0) return store;
  using _unused = store;
  log.warn(`${handed.size} fds of an earlier process are closed: the fd store of systemd is not used`);
  for (const key of await store.list()) await store.delete(key);
  return undefined;
}

/** Those that were stored from here; others, of socket units, are left alone. */
function takeHanded(names: readonly string[]): Map<string, OwnedFd> {
  using undo = new DisposableStack();
  const taken = undo.adopt(new Map<string, OwnedFd>(), closeAll);
  for (const [index, name] of names.entries()) {
    if (!isStoreName(name)) continue;
    // A child of this process would have it.
    using inherited = new OwnedFd(FIRST_LISTEN_FD + index, new CloseLane());
    if (!taken.has(name)) taken.set(name, inherited.dup());
  }
  undo.move();
  return taken;
}
