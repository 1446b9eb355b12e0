import { VhostdError } from "../base/errors.ts";
import type { OwnedFd } from "../native/fd.ts";
import type { Backend } from "./backend.ts";
import { LOG_DESCRIPTION, ProtocolFeature, U64 } from "./messages.ts";
import { checkEventfd } from "./rings.ts";

/** Handlers of the messages about the dirty log. A VMM aborts its guest when it is told that one of them failed. */

/** SET_LOG_BASE. Where no log is shared it is never meant seriously. */
export async function setLogBase(
  backend: Backend,
  payload: Uint8Array,
  fds: OwnedFd[],
): Promise<Uint8Array | undefined> {
  if (!backend.has(ProtocolFeature.LOG_SHMFD)) return undefined;
  if (payload.byteLength !== LOG_DESCRIPTION.size || fds.length !== 1) {
    throw new VhostdError(
      "protocol",
      `SET_LOG_BASE has ${payload.byteLength} bytes of payload and ${fds.length} fds, ` +
        `must be ${LOG_DESCRIPTION.size} bytes and 1 fd`,
    );
  }
  backend.logging.accept(LOG_DESCRIPTION.read(payload), fds.shift()!);
  return U64.encode({ value: 0n });
}

/** SET_LOG_FD: to be signalled when something was marked. Nobody waits for that where the log is shared; it is closed. */
export async function setLogFd(_backend: Backend, _payload: Uint8Array, [fd]: OwnedFd[]): Promise<void> {
  if (fd !== undefined) checkEventfd(fd, "log fd");
}
