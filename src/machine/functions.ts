import { VhostdError } from "../base/errors.ts";
import { type PciAddress, parsePciAddress } from "../pci/address.ts";
import { Bus, type BusEntry, type KernelTransport, VFIO_DRIVER } from "../pci/bus.ts";
import { hinderingNeighbours, neighboursOf } from "../pci/vfio/group-neighbours.ts";
import type { Machine } from "./machine.ts";

/** The directory of all functions. */
export const DEVICES = "/sys/bus/pci/devices";
/** Where VFIO's driver is, once it is there. */
export const VFIO_DRIVER_DIRECTORY = `/sys/bus/pci/drivers/${VFIO_DRIVER}`;

const VIRTIO_VENDOR = 0x1af4;
/** virtio 1.2, 4.1.2: transitional ones from 0x1000, modern ones to 0x107f. */
const VIRTIO_DEVICES = { first: 0x1000, last: 0x107f };
const BRIDGE_CLASS = 0x06;

/** A function that this machine's kernel knows. */
export interface MachineFunction extends Omit<BusEntry, "transport"> {
  /** As the machine names it, whatever its root is. */
  readonly path: string;
  readonly transport: KernelTransport;
}

/** @throws VhostdError noDevice, probeFailed */
export async function findFunction(machine: Machine, address: PciAddress): Promise<MachineFunction> {
  const entry = await new Bus([machine.at(DEVICES)]).find(address);
  if (entry?.transport.kind !== "vfio") {
    throw new VhostdError("noDevice", `this machine has no function ${address}`, {
      fix: "`lspci -D` lists what it has",
    });
  }
  return { ...entry, path: `${DEVICES}/${address}`, transport: entry.transport };
}

/** Every virtio function, by address. */
export async function virtioFunctions(machine: Machine): Promise<MachineFunction[]> {
  const found: MachineFunction[] = [];
  for (const name of await machine.names(DEVICES)) {
    const [vendor, device = 0] = await Promise.all([
      machine.number(`${DEVICES}/${name}/vendor`),
      machine.number(`${DEVICES}/${name}/device`),
    ]);
    const isVirtio = vendor === VIRTIO_VENDOR && device >= VIRTIO_DEVICES.first && device <= VIRTIO_DEVICES.last;
    if (isVirtio) found.push(await findFunction(machine, parsePciAddress(name)));
  }
  return found;
}

/** What keeps VFIO from opening the IOMMU group of a function. */
export interface Hindrance {
  /** "0000:02:00.0 (virtio-pci)", one after the other. */
  readonly names: string;
  /** What to do about all of them, as a sentence. */
  readonly fix: string;
}

/** The other functions of an IOMMU group that drivers have; undefined where none is in the way. */
export async function groupHindrance(machine: Machine, path: string): Promise<Hindrance | undefined> {
  const neighbours = hinderingNeighbours(await neighboursOf(machine.at(path)));
  if (neighbours.length === 0) return undefined;
  const fixes = neighbours.map(async ({ address, driver }) => {
    const deviceClass = (await machine.number(`${DEVICES}/${address}/class`)) ?? 0;
    // VFIO takes no bridges; one that no driver has is in nobody's way.
    return deviceClass >> 16 === BRIDGE_CLASS
      ? `echo ${address} > /sys/bus/pci/drivers/${driver}/unbind`
      : `vfe-vhost-cli bind ${address}`;
  });
  return {
    names: neighbours.map(({ address, driver }) => `${address} (${driver})`).join(", "),
    fix: `${(await Promise.all(fixes)).join("; ")}; or put the function into a slot of its own`,
  };
}
