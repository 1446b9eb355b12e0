import { lstatSync } from "node:fs";
import { isAbsolute, resolve } from "node:path";
import { VhostdError } from "../base/errors.ts";

/** sun_path of unix(7), without the closing zero. */
const LONGEST_SOCKET_PATH = 107;

/** The path of a vhost-user socket in its shortest form. @throws VhostdError badArguments, socketPath */
export function checkSocketPath(path: string): string {
  if (!isAbsolute(path)) {
    throw new VhostdError("badArguments", `the socket path ${JSON.stringify(path)} is not absolute`, {
      fix: "give the whole path: the working directory of the daemon is its own matter",
    });
  }
  const socket = resolve(path);
  const there = lstatSync(socket, { throwIfNoEntry: false });
  if (there !== undefined && !there.isSocket()) {
    throw new VhostdError("socketPath", `${socket} is there and is no socket`, { fix: "give another path" });
  }
  const length = Buffer.byteLength(socket);
  if (length > LONGEST_SOCKET_PATH) {
    throw new VhostdError(
      "socketPath",
      `the socket path has ${length} bytes, a unix socket takes ${LONGEST_SOCKET_PATH}`,
      { fix: "use a shorter path" },
    );
  }
  return socket;
}
