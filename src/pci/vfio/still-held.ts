import type { Deadline } from "../../base/deadline.ts";
import { VhostdError } from "../../base/errors.ts";
import { slowClose } from "../../native/slow.ts";
import type { BusEntry } from "../bus.ts";
import { Errno } from "./iommu-uapi.ts";
import { KernelCalls } from "./kernel-calls.ts";
import { openFileOf, whileBusy } from "./opening.ts";

/**
 * Whether somebody else still has a function open that this process has closed. The kernel lets a group be opened once
 * only, and keeps it open as long as a function of it is; where it has no file for the group nothing is found out.
 * Never rejects.
 * @returns who, in words; undefined where nobody is known to
 */
export async function stillHeld(entry: BusEntry, deadline: Deadline): Promise<string | undefined> {
  const { transport } = entry;
  if (transport.kind !== "vfio" || transport.group === undefined) return undefined;
  const [path, calls] = [`/dev/vfio/${transport.group}`, new KernelCalls()];
  try {
    const open = () => openFileOf(path, calls, deadline);
    await slowClose(await whileBusy({ ...entry, transport }, [Errno.EBUSY], deadline, open));
  } catch (error) {
    if (error instanceof VhostdError && error.code === "busy") return error.message;
  }
  return undefined;
}
