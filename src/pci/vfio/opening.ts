import { Deadline } from "../../base/deadline.ts";
import { VhostdError } from "../../base/errors.ts";
import type { OwnedFd } from "../../native/fd.ts";
import { slowClose } from "../../native/slow.ts";
import { isVfioDriver } from "../bus.ts";
import { openDeviceFile } from "./device-file.ts";
import { hinderingNeighbours, type Neighbour, neighboursOf } from "./group-neighbours.ts";
import { describeHolders, findHolders } from "./holders.ts";
import type { KernelEntry } from "./iommu.ts";
import { Errno, failedWith } from "./iommu-uapi.ts";
import type { KernelCalls } from "./kernel-calls.ts";

/** Milliseconds for which something that another process is closing is waited for. A close takes as long as a reset. */
const BUSY_PATIENCE = 2_000;
const BUSY_INTERVAL = 50;

const MISSING = [Errno.ENOENT, Errno.ENXIO, Errno.ENODEV];
const FORBIDDEN = [Errno.EPERM, Errno.EACCES];

/**
 * The IOMMU group of a function that VFIO can open.
 * @throws VhostdError iommuGroup where no IOMMU keeps it apart; iommuGroupBind where another driver has it
 */
export function checkUsable({ address, transport }: KernelEntry): number {
  const { driver, group } = transport;
  if (group === undefined) {
    throw new VhostdError(
      "iommuGroup",
      `${address} is in no IOMMU group: what it reaches in memory cannot be confined`,
      {
        fix: "switch the IOMMU on in the firmware, and with intel_iommu=on or amd_iommu=on on the kernel's command line",
      },
    );
  }
  if (driver === undefined || !isVfioDriver(driver)) {
    const owner = driver === undefined ? "has no driver" : `belongs to the driver ${driver}`;
    throw new VhostdError("iommuGroupBind", `${address} ${owner}; VFIO opens functions of the driver vfio-pci`, {
      fix: `bind it: vfe-vhost-cli bind ${address}`,
    });
  }
  return group;
}

/**
 * @param missing what to do where the file is not there
 * @throws SystemError EBUSY; VhostdError iommuContainer where it is not there or not allowed
 */
export async function openFileOf(
  path: string,
  calls: KernelCalls,
  deadline: Deadline,
  missing = "load the kernel module vfio-pci (modprobe vfio-pci), and bind the function again",
): Promise<OwnedFd> {
  try {
    return await calls.run(deadline, () => openDeviceFile(path), slowClose);
  } catch (error) {
    if (failedWith(error, ...MISSING)) {
      throw new VhostdError("iommuContainer", `there is no ${path}`, { fix: missing, cause: error });
    }
    if (failedWith(error, ...FORBIDDEN)) {
      const fix = "run the daemon as root, or give its user the files under /dev/vfio, and /dev/iommu";
      throw new VhostdError("iommuContainer", `this user may not open ${path}`, { fix, cause: error });
    }
    throw error;
  }
}

/**
 * Tries until it is not busy any more.
 * @param errnos what says that it is busy
 * @param unheld what it means that it stays so where nobody is found who has it
 * @throws VhostdError busy, which names who is in the way; iommuGroup where it is another driver
 */
export async function whileBusy<T>(
  entry: KernelEntry,
  errnos: readonly number[],
  deadline: Deadline,
  attempt: () => Promise<T>,
  unheld: (cause: unknown) => VhostdError | undefined = () => undefined,
): Promise<T> {
  // Half of it: finding out who is in the way takes time too.
  const patience = Deadline.after(Math.min(BUSY_PATIENCE, deadline.remaining / 2), deadline.what);
  for (;;) {
    try {
      return await attempt();
    } catch (error) {
      if (!failedWith(error, ...errnos)) throw error;
      const viability = await viabilityError(entry, error);
      if (viability !== undefined) throw viability;
      if (patience.remaining <= BUSY_INTERVAL) throw await busyError(entry, deadline, error, unheld);
      await Bun.sleep(BUSY_INTERVAL);
    }
  }
}

/** The group cannot be used because of what else is in it. @returns undefined where nothing is */
export async function viabilityError(entry: KernelEntry, cause?: unknown): Promise<VhostdError | undefined> {
  const hindering = hinderingNeighbours(await neighboursOf(entry.directory));
  if (hindering.length === 0) return undefined;
  const named = hindering.map(({ address, driver }) => `${address} (driver ${driver})`).join(", ");
  return new VhostdError(
    "iommuGroup",
    `${entry.address} shares IOMMU group ${entry.transport.group} with ${named}: the kernel gives a group away as a whole`,
    { fix: `${freeing(hindering)}; or put the function in a slot with a group of its own`, cause },
  );
}

/** The commands that take devices from their drivers. VFIO takes functions; a bridge is better left without a driver. */
function freeing(neighbours: readonly Neighbour[]): string {
  const functions = neighbours.filter(({ bridge }) => !bridge).map(({ address }) => address);
  const bridges = neighbours.filter(({ bridge }) => bridge);
  return [
    ...(functions.length === 0 ? [] : [`vfe-vhost-cli bind ${functions.join(" ")}`]),
    ...bridges.map(({ address, driver }) => `echo ${address} > /sys/bus/pci/drivers/${driver}/unbind`),
  ].join(", and ");
}

async function busyError(
  entry: KernelEntry,
  deadline: Deadline,
  cause: unknown,
  unheld: (cause: unknown) => VhostdError | undefined,
): Promise<VhostdError> {
  const { address, transport, directory } = entry;
  // Not held: the kernel wants to reset it when it is opened, and cannot as long as another has it locked for that.
  if (failedWith(cause, Errno.EAGAIN)) {
    return new VhostdError("busy", `${address} cannot be opened: somebody resets it, or its bus, again and again`, {
      fix: `end what writes to ${directory}/reset, or resets a function of the same bus; then try again`,
      cause,
    });
  }
  const cdevs = [transport.cdev, ...(await neighboursOf(directory)).map(({ cdev }) => cdev)];
  const paths = cdevs.filter((cdev) => cdev !== undefined).map((cdev) => `/dev/vfio/devices/${cdev}`);
  const search = findHolders([`/dev/vfio/${transport.group}`, ...paths], address);
  // Better without a name than too late.
  const holders = describeHolders(await deadline.race(search).catch(() => []));
  // The kernel has one number for both.
  if (holders === undefined && failedWith(cause, Errno.EPERM)) return interruptsError(entry, cause);
  const otherwise = holders === undefined ? unheld(cause) : undefined;
  if (otherwise !== undefined) return otherwise;
  return new VhostdError(
    "busy",
    `${address} (IOMMU group ${transport.group}) is in use${holders === undefined ? "" : `: ${holders}`}`,
    {
      fix: "end what uses it; functions of one IOMMU group can serve one VM only, and a front-end that maps a doorbell keeps the function open",
      cause,
    },
  );
}

/** A function that could write to any interrupt of the machine is not given away. */
export function interruptsError({ address }: KernelEntry, cause: unknown): VhostdError {
  return new VhostdError("iommuContainer", `${address} cannot be used: the IOMMU does not remap interrupts`, {
    fix: "switch interrupt remapping on in the firmware",
    cause,
  });
}

/** What a refused vf-token means. */
export function tokenError({ address, physfn }: KernelEntry, cause: unknown): VhostdError {
  const reason =
    physfn === undefined
      ? "its VFs are open with another vf-token"
      : `its PF ${physfn} was opened with another vf-token, or never with one`;
  const first = physfn === undefined ? "end who has VFs of it open" : `add its PF ${physfn} first`;
  return new VhostdError("accessDenied", `the kernel refused the vf-token for ${address}: ${reason}`, {
    fix: `${first}; a PF and its VFs need the same one (vf-token in the configuration)`,
    cause,
  });
}

/** For calls whose late result needs no undoing. */
export function ignore(): void {}
