import type { Deadline } from "../base/deadline.ts";
import { SystemError, VhostdError } from "../base/errors.ts";
import type { Json } from "../base/json.ts";
import type { OwnedFd } from "../native/fd.ts";
import type { PciAddress } from "./address.ts";
import type { AddressSpace } from "./address-space.ts";
import type { BusEntry } from "./bus.ts";
import type { PciFunction } from "./function.ts";
import { VfioUserAddressSpace } from "./vfio-user/address-space.ts";
import { VfioUserFunction } from "./vfio-user/function.ts";

/** What to do where a vfio-user server cannot be reached, by errno. */
const FIXES: Readonly<Record<number, string>> = {
  2: "its server has gone away: start it again (vfe-softvf makes the devices directory anew)",
  13: "let this user open the socket of the function's server",
  16: "another process uses the function: end it first, or take another function",
  111: "its server died and left its socket behind: start it again",
};

/**
 * Opens a function by the transport of its bus entry.
 * @throws VhostdError notSupported for kernel VFIO; otherwise what the transport says
 */
export async function openFunction(entry: BusEntry, address: PciAddress, deadline: Deadline): Promise<PciFunction> {
  if (entry.transport.kind === "vfio") throw noKernelVfio(address);
  const { socket } = entry.transport;
  try {
    return await VfioUserFunction.connect(address, socket, deadline);
  } catch (error) {
    const fix = error instanceof SystemError ? FIXES[error.errno] : undefined;
    if (!(error instanceof SystemError) || fix === undefined) throw error;
    throw new SystemError(error.call, error.errno, { fix, cause: error });
  }
}

/** What functions of one VM that have this transport share. */
export function createAddressSpace(kind: BusEntry["transport"]["kind"]): AddressSpace {
  if (kind === "vfio") throw noKernelVfio("a function");
  return new VfioUserAddressSpace();
}

/**
 * Goes on with a function as another process left it, without a message to it. Takes the fds.
 * @throws VhostdError invalid where the record or the fds do not fit
 */
export function reviveFunction(
  entry: BusEntry,
  address: PciAddress,
  data: Json,
  fds: Map<string, OwnedFd>,
): PciFunction {
  if (entry.transport.kind === "vfio") throw noKernelVfio(address);
  return VfioUserFunction.revive(address, data, fds);
}

function noKernelVfio(what: string): VhostdError {
  return new VhostdError("notSupported", `${what} is reached through kernel VFIO, which this version cannot do`, {
    fix: "use functions served over vfio-user, for example by vfe-softvf",
  });
}
