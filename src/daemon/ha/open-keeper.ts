import { VhostdError } from "../../base/errors.ts";
import type { Logger } from "../../base/log.ts";
import { keeperSocket } from "../../runtime-directory.ts";
import { connectFdStore } from "../../systemd/connect-fd-store.ts";
import type { ServiceEnvironment } from "../../systemd/service-environment.ts";
import type { DaemonConfig } from "../config.ts";
import { type Keeper, nullKeeper } from "../keeper.ts";
import { KeeperLink } from "./keeper-link.ts";
import { SystemdKeeper } from "./systemd-keeper.ts";

/** fds that systemd stores for the unit of the package, where it does not say so itself (before version 254). */
const FD_STORE_MAX = 65_536;

/**
 * The keeper that the configuration wants.
 * @throws VhostdError where one is there that does not serve this daemon, or the one that is named is not there
 */
export async function openKeeper(
  { ha, runtimeDirectory }: Pick<DaemonConfig, "ha" | "runtimeDirectory">,
  environment: ServiceEnvironment,
  log: Logger,
): Promise<Keeper & Disposable> {
  const own = log.child("ha");
  // What is there of an earlier process would hold its functions and connections open.
  const most = ha === "fd-store" ? FD_STORE_MAX : ha === "auto" ? undefined : 0;
  const store = await connectFdStore(environment, own, most);
  using undo = new DisposableStack();
  if (store !== undefined) undo.use(store);
  if (ha === "off") return { ...nullKeeper, [Symbol.dispose]() {} };
  if (store !== undefined && (ha === "fd-store" || (await store.list()).length > 0)) {
    undo.move();
    return new SystemdKeeper(store, own);
  }
  if (ha === "fd-store") {
    throw new VhostdError("notSupported", "systemd has no fd store for this process", {
      fix: 'run it as a service with FileDescriptorStoreMax=, or choose another way (ha = "keeper")',
    });
  }
  const link = await KeeperLink.open(keeperSocket(runtimeDirectory), own);
  if (store === undefined || link.info() !== undefined) return link;
  link[Symbol.dispose]();
  undo.move();
  return new SystemdKeeper(store, own);
}
