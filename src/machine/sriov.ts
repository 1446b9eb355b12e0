import { asError, SystemError, VhostdError } from "../base/errors.ts";
import type { PciAddress } from "../pci/address.ts";
import { isVfioDriver, VFIO_DRIVER } from "../pci/bus.ts";
import { carryOutBind, planBind } from "./bind.ts";
import { findFunction } from "./functions.ts";
import type { Machine } from "./machine.ts";
import { refuseUsedVfs } from "./refusals.ts";
import { isDenied, type Step, takeSteps } from "./steps.ts";
import { ENABLE_SRIOV, valueStep, vfNumberStep } from "./vfs.ts";

/** VFs of a PF that is bound to vfio-pci (Linux, Documentation/PCI/pci-iov-howto.rst). */

/** The kernel found no room for the VFs: bus numbers or addresses. */
export const ROOM_FIX =
  "start the kernel with pci=realloc,assign-busses and reserve room for VFs in the firmware (dmesg names what lacks)";
const ENOMEM = 12;

/** What would be done to a PF. No steps: it has that many VFs already. */
export interface SriovPlan {
  readonly address: PciAddress;
  readonly count: number;
  /** How many it has before. */
  readonly former: number;
  readonly steps: readonly Step[];
}

/**
 * @param force also where VFs that would go are in use: the kernel then waits until they are closed
 * @throws VhostdError noDevice, notSupported, invalid, iommuGroupBind, busy
 */
export async function planSriov(
  machine: Machine,
  address: PciAddress,
  count: number,
  force: boolean,
): Promise<SriovPlan> {
  const fn = await findFunction(machine, address);
  const total = await machine.number(`${fn.path}/sriov_totalvfs`);
  const current = await machine.number(`${fn.path}/sriov_numvfs`);
  if (fn.physfn !== undefined || total === undefined || current === undefined) {
    const fix = fn.physfn === undefined ? undefined : `its PF is ${fn.physfn}`;
    throw new VhostdError("notSupported", `${address} is no PF that can have VFs`, fix === undefined ? {} : { fix });
  }
  if (count > total) {
    throw new VhostdError("invalid", `${address} can have ${total} VFs, not ${count}`, {
      fix: "the card's own configuration may allow more",
    });
  }
  const { driver } = fn.transport;
  if (driver === undefined || !isVfioDriver(driver)) {
    throw new VhostdError("iommuGroupBind", `${address} has ${driver ?? "no driver"}, not ${VFIO_DRIVER}`, {
      fix: `vfe-vhost-cli bind ${address}`,
    });
  }
  if (current === count) return { address, count, former: current, steps: [] };
  if (current > 0 && !force) await refuseUsedVfs(machine, fn, "sriov --force");
  return { address, count, former: current, steps: await sriovSteps(machine, fn.path, current, count) };
}

async function sriovSteps(machine: Machine, path: string, current: number, count: number): Promise<Step[]> {
  const numbers = [...(current > 0 ? [0] : []), ...(count > 0 ? [count] : [])];
  const steps = numbers.map((value) => vfNumberStep(path, value));
  if (count === 0 || (await machine.text(ENABLE_SRIOV)) === "Y") return steps;
  return [valueStep(ENABLE_SRIOV, "Y"), ...steps];
}

/**
 * Where the VFs cannot be had, the PF has as many again as before: other ones, as the former are gone.
 * @returns the addresses of the VFs, by index, all bound to vfio-pci
 * @throws SystemError, VhostdError
 */
export async function carryOutSriov(machine: Machine, plan: SriovPlan): Promise<PciAddress[]> {
  try {
    await takeSteps(machine, plan.steps);
  } catch (error) {
    throw await undone(machine, plan, error);
  }
  const vfs = await bindVfs(machine, plan.address);
  if (vfs.length !== plan.count) {
    throw new VhostdError("io", `${plan.address} has ${vfs.length} VFs now, not ${plan.count}`);
  }
  return vfs;
}

/** Writes the former number back. @returns what to say, with the number that it has then */
async function undone(machine: Machine, { address, count, former }: SriovPlan, error: unknown): Promise<VhostdError> {
  const { path } = await findFunction(machine, address);
  const numberOf = () => machine.number(`${path}/sriov_numvfs`);
  if ((await numberOf()) === 0 && former > 0) {
    const restored = takeSteps(machine, [vfNumberStep(path, former)]).then(() => bindVfs(machine, address));
    await restored.catch(() => undefined);
  }
  const now = await numberOf();
  const state = now === former ? `it has ${now} VFs as before` : `it has ${now ?? "an unknown number of"} VFs now`;
  const said = `${asError(error).message}; ${state}`;
  if (error instanceof SystemError && error.errno === ENOMEM) {
    const message = `${address} has no room for ${count} VFs: ${said}`;
    return new VhostdError("outOfMemory", message, { fix: ROOM_FIX, cause: error });
  }
  const message = `${address} was not given ${count} VFs: ${said}`;
  if (isDenied(error)) return new VhostdError("accessDenied", message, { fix: error.fix, cause: error });
  const number = error instanceof VhostdError ? error.number : "io";
  return new VhostdError(number, message, { fix: "`dmesg` tells why the kernel refused", cause: error });
}

/** The kernel binds them by itself, unless sriov_drivers_autoprobe says no. */
async function bindVfs(machine: Machine, pf: PciAddress): Promise<PciAddress[]> {
  const vfs = [...(await findFunction(machine, pf)).virtfns.values()];
  for (const vf of vfs) {
    const bind = await planBind(machine, vf, false);
    if (bind.steps.length > 0) await carryOutBind(machine, bind);
  }
  return vfs;
}
