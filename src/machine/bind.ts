import { asError, VhostdError } from "../base/errors.ts";
import { type PciAddress, parsePciAddress } from "../pci/address.ts";
import { isVfioDriver, VFIO_DRIVER } from "../pci/bus.ts";
import { findFunction, groupHindrance, type MachineFunction, VFIO_DRIVER_DIRECTORY } from "./functions.ts";
import { iommuFix } from "./iommu.ts";
import type { Machine } from "./machine.ts";
import { refuseHolders, refuseUsedVfs, refuseUses } from "./refusals.ts";
import { isDenied, type Step, takeSteps } from "./steps.ts";
import { ENABLE_SRIOV, vfNumberStep } from "./vfs.ts";

/** Functions given to vfio-pci and back, by `driver_override` (Documentation/ABI/testing/sysfs-bus-pci). */

const PROBE = "/sys/bus/pci/drivers_probe";
/** How an attribute without a value reads. */
const NONE = "(null)";

/** What would be done to one function. No steps: it is so already. */
export interface Plan {
  readonly address: PciAddress;
  /** The driver that it has before. */
  readonly driver: string | undefined;
  readonly steps: readonly Step[];
}

/** What came of it. */
export interface Outcome {
  readonly address: PciAddress;
  readonly driver: string | undefined;
  readonly warnings: readonly string[];
}

/**
 * @param force also where this machine itself uses the function, or somebody its VFs, which go
 * @throws VhostdError noDevice, iommuGroup, busy
 */
export async function planBind(machine: Machine, address: PciAddress, force: boolean): Promise<Plan> {
  const fn = await findFunction(machine, address);
  const { driver, group } = fn.transport;
  if (group === undefined) {
    throw new VhostdError("iommuGroup", `${address} has no IOMMU group: its DMA could not be confined`, {
      fix: await iommuFix(machine),
    });
  }
  if (driver !== undefined && isVfioDriver(driver)) return { address, driver, steps: [] };
  if (!force) {
    await refuseUses(machine, fn, "bind --force");
    await refuseUsedVfs(machine, fn, "bind --force");
  }
  return { address, driver, steps: await bindSteps(machine, fn) };
}

async function bindSteps(machine: Machine, fn: MachineFunction): Promise<Step[]> {
  const { path, address } = fn;
  const loaded = await machine.exists(VFIO_DRIVER_DIRECTORY);
  return [
    ...(loaded ? [] : [loadStep()]),
    overrideStep(path, VFIO_DRIVER),
    ...releaseSteps(fn),
    { path: PROBE, value: address, check: (after) => expectDriver(after, path, VFIO_DRIVER) },
  ];
}

function loadStep(): Step {
  const check = async (machine: Machine) =>
    (await machine.exists(VFIO_DRIVER_DIRECTORY)) ? undefined : `there is no ${VFIO_DRIVER_DIRECTORY}`;
  return { command: ["modprobe", VFIO_DRIVER], check };
}

/** @param driver the only one that may have the function; "" for whichever takes it */
function overrideStep(path: string, driver: string): Step {
  const attribute = `${path}/driver_override`;
  const check = async (machine: Machine) => {
    const seen = await machine.text(attribute);
    return seen === driver || (driver === "" && seen === NONE) ? undefined : `it says ${JSON.stringify(seen)}`;
  };
  return { path: attribute, value: driver, check };
}

function releaseSteps({ path, address, transport }: MachineFunction): Step[] {
  if (transport.driver === undefined) return [];
  const check = (machine: Machine) => expectDriver(machine, path, undefined);
  return [{ path: `${path}/driver/unbind`, value: address, check }];
}

async function expectDriver(machine: Machine, path: string, wanted: string | undefined): Promise<string | undefined> {
  const seen = await machine.linkName(`${path}/driver`);
  return seen === wanted ? undefined : `the function has ${seen === undefined ? "no driver" : `the driver ${seen}`}`;
}

/**
 * Binds, reading each step back. Where vfio-pci does not take the function, it gets its former driver again.
 * @throws SystemError, VhostdError
 */
export async function carryOutBind(machine: Machine, plan: Plan): Promise<Outcome> {
  const { address, driver, steps } = plan;
  const path = (await findFunction(machine, address)).path;
  try {
    await takeSteps(machine, steps);
  } catch (error) {
    await takeSteps(machine, [overrideStep(path, ""), { path: PROBE, value: address }]).catch(() => undefined);
    const restored = (await machine.linkName(`${path}/driver`)) === driver;
    const state = restored ? `it has ${driver ?? "no driver"} as before` : "its former driver did not take it back";
    const [code, fix] = isDenied(error)
      ? (["accessDenied", error.fix] as const)
      : (["io", "`dmesg` tells why the kernel refused"] as const);
    throw new VhostdError(code, `${address} was not bound: ${asError(error).message}; ${state}`, { fix, cause: error });
  }
  const hindrance = await groupHindrance(machine, path);
  const group = await machine.linkName(`${path}/iommu_group`);
  const warnings =
    hindrance === undefined
      ? []
      : [`IOMMU group ${group} of ${address} cannot be used yet: drivers have ${hindrance.names}; ${hindrance.fix}`];
  return { address, driver: VFIO_DRIVER, warnings };
}

/**
 * Back to the driver that the function would have by itself. A PF loses its VFs with vfio-pci.
 * @throws VhostdError noDevice; busy where a process has it, or a VF of it, open: the kernel would wait until it is closed
 */
export async function planUnbind(machine: Machine, address: PciAddress): Promise<Plan> {
  const fn = await findFunction(machine, address);
  const { path } = fn;
  const { driver } = fn.transport;
  const override = (await machine.text(`${path}/driver_override`)) ?? NONE;
  const steps: Step[] = override === NONE || override === "" ? [] : [overrideStep(path, "")];
  if (driver !== undefined && !isVfioDriver(driver)) return { address, driver, steps };
  await refuseHolders(machine, fn, "`vfe-vhost-cli vf -r` or `mgmtpf -r`, or end that process");
  await refuseUsedVfs(machine, fn, undefined);
  const vfs = await removeVfSteps(machine, fn);
  return { address, driver, steps: [...vfs, ...steps, ...releaseSteps(fn), { path: PROBE, value: address }] };
}

/** VFs would go with vfio-pci in any case; as a step of its own it is seen. */
async function removeVfSteps(machine: Machine, { path, transport, virtfns }: MachineFunction): Promise<Step[]> {
  if (transport.driver === undefined || virtfns.size === 0) return [];
  return (await machine.text(ENABLE_SRIOV)) === "Y" ? [vfNumberStep(path, 0)] : [];
}

/** @throws SystemError; VhostdError busy where vfio-pci takes the function again */
export async function carryOutUnbind(machine: Machine, plan: Plan): Promise<Outcome> {
  const { address, steps } = plan;
  await takeSteps(machine, steps);
  const { path } = await findFunction(machine, address);
  let driver = await machine.linkName(`${path}/driver`);
  if (driver === undefined) {
    // Its module may not be there: nobody asked for it while the function was vfio-pci's.
    const alias = await machine.text(`${path}/modalias`);
    if (alias !== undefined) await machine.run(["modprobe", alias]).catch(() => undefined);
    driver = await machine.linkName(`${path}/driver`);
  }
  if (driver === VFIO_DRIVER) {
    const ids = [await machine.text(`${path}/vendor`), await machine.text(`${path}/device`)].join(" ");
    throw new VhostdError("busy", `${VFIO_DRIVER} takes ${address} by itself: its id was once written to new_id`, {
      fix: `echo ${ids} > ${VFIO_DRIVER_DIRECTORY}/remove_id, then unbind again`,
    });
  }
  const warnings = driver === undefined ? [`no driver of this kernel takes ${address} by itself`] : [];
  return { address, driver, warnings };
}

/** Addresses as people write them, each once. @throws VhostdError badArguments */
export function parseAddresses(texts: readonly string[]): PciAddress[] {
  return [...new Set(texts.map(parsePciAddress))];
}
