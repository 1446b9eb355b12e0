import { readFile } from "node:fs/promises";
import { asError, VhostdError } from "../../base/errors.ts";
import type { PciAddress } from "../../pci/address.ts";
import type { Machine } from "../machine.ts";
import type { Finding } from "./finding.ts";
import { checkFunctions } from "./functions.ts";
import { checkGuest, type Guest } from "./guest.ts";
import { checkIommu, checkKernel } from "./kernel.ts";
import { checkLimits } from "./limits.ts";
import { listenersAt } from "./listeners.ts";
import { checkHugePages } from "./memory.ts";
import { readQemuOptions } from "./qemu-options.ts";
import { checkQemuVersion, runningQemu } from "./running-qemu.ts";
import { checkSecurity } from "./security.ts";
import { checkSocket } from "./sockets.ts";
import { checkVfio } from "./vfio.ts";

/** What is to be looked at beside the machine itself. */
export interface Subjects {
  /** Functions that are to be used; none: whichever there are. */
  readonly devices: readonly PciAddress[];
  /** vhost-user sockets. */
  readonly sockets: readonly string[];
  /** The daemon's control socket. */
  readonly rpcSocket: string;
  /** A QEMU that runs. */
  readonly qemu: number | undefined;
  /** A file with the options of a QEMU. */
  readonly qemuArgs: string | undefined;
}

/**
 * All checks of a machine but those that ask the daemon.
 * @throws VhostdError notFound, badArguments where a QEMU or its options cannot be read
 */
export async function examine(machine: Machine, subjects: Subjects): Promise<Finding[]> {
  const guest = await readGuest(machine, subjects);
  const sockets = [...new Set([...subjects.sockets, ...(guest?.sockets ?? [])])];
  const [daemon] = (await listenersAt(machine, subjects.rpcSocket)) ?? [];
  // A guest that runs has its pages already.
  const wanted = subjects.qemu === undefined ? guest?.hugePages : undefined;
  const findings = await Promise.all([
    checkKernel(machine),
    checkIommu(machine),
    checkVfio(machine),
    checkFunctions(machine, subjects.devices),
    checkHugePages(machine, wanted),
    checkLimits(machine, daemon?.pid),
    subjects.qemu === undefined ? [] : checkQemuVersion(machine, subjects.qemu),
    guest?.findings ?? [],
    Promise.all(sockets.map((path) => checkSocket(machine, path))),
    checkSecurity(machine, subjects.qemu, sockets),
  ]);
  return findings.flat();
}

async function readGuest(machine: Machine, { qemu, qemuArgs }: Subjects): Promise<Guest | undefined> {
  if (qemu !== undefined) return await checkGuest(machine, await runningQemu(machine, qemu));
  if (qemuArgs === undefined) return undefined;
  const text = await readFile(qemuArgs, "utf8").catch((cause) => {
    throw new VhostdError("notFound", `${qemuArgs} cannot be read: ${asError(cause).message}`, { cause });
  });
  return await checkGuest(machine, readQemuOptions(text));
}
