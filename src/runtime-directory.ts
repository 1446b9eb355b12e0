import { mkdir, rmdir } from "node:fs/promises";
import { join } from "node:path";
import { errnoText, VhostdError } from "./base/errors.ts";

/** Where the daemon keeps its sockets and state when nobody says otherwise. */
export const DEFAULT_RUNTIME_DIRECTORY = "/run/vfe-vhostd";

/** The control socket of the daemon that runs in this directory. */
export function rpcSocket(runtimeDirectory: string): string {
  return join(runtimeDirectory, "rpc.sock");
}

/** The directory of that daemon's keeper, which locks it. */
export function keeperDirectory(runtimeDirectory: string): string {
  return join(runtimeDirectory, "ha");
}

/** The socket of the keeper. */
export function keeperSocket(runtimeDirectory: string): string {
  return join(keeperDirectory(runtimeDirectory), "keeper.sock");
}

/**
 * Makes the directory of a program's sockets.
 * @param program as people type it
 * @returns takes the directory away if it was made here and is empty by then
 * @throws VhostdError with the system's errno
 */
export async function makeRuntimeDirectory(path: string, program: string): Promise<() => Promise<void>> {
  let made: string | undefined;
  try {
    // Tells the first directory that it made: where that is ours, nobody else has anything in it.
    made = await mkdir(path, { recursive: true, mode: 0o755 });
  } catch (cause) {
    const errno = Math.abs((cause as NodeJS.ErrnoException).errno ?? 5);
    throw new VhostdError(errno, `the runtime directory ${path} cannot be made: ${errnoText(errno)}`, {
      fix: `run ${program} as root, or choose another directory with --runtime-dir`,
      cause,
    });
  }
  return made === undefined ? async () => {} : () => rmdir(path).catch(() => {});
}
