import { join } from "node:path";

/** Where the daemon keeps its sockets and state when nobody says otherwise. */
export const DEFAULT_RUNTIME_DIRECTORY = "/run/vfe-vhostd";

/** The control socket of the daemon that runs in this directory. */
export function rpcSocket(runtimeDirectory: string): string {
  return join(runtimeDirectory, "rpc.sock");
}
