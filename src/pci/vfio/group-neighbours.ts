import { readdir, readFile, readlink } from "node:fs/promises";
import { basename, join } from "node:path";
import { isVfioDriver } from "../bus.ts";

/** Another device of a function's IOMMU group. */
export interface Neighbour {
  readonly address: string;
  /** undefined where it has none. */
  readonly driver: string | undefined;
  /** It is no function that does work of its own, but leads to others. */
  readonly bridge: boolean;
  /** Its file under /dev/vfio/devices, where it has one. */
  readonly cdev: string | undefined;
}

/** Base class and subclass of bridges between PCI buses, as sysfs begins the class code. */
const BRIDGE_CLASS = "0x0604";
/** Drivers beside those of VFIO that do no DMA: they do not stand in the way (driver_managed_dma in the kernel). */
const HARMLESS = ["pci-stub", "pcieport"];

/** The devices of the group of the function with this sysfs directory, itself left out. */
export async function neighboursOf(directory: string): Promise<Neighbour[]> {
  const devices = join(directory, "iommu_group/devices");
  const addresses = (await readdir(devices).catch(() => [])).filter((address) => address !== basename(directory));
  return Promise.all(
    addresses.sort().map(async (address) => {
      const driver = await readlink(join(devices, address, "driver")).catch(() => undefined);
      const pciClass = await readFile(join(devices, address, "class"), "utf8").catch(() => "");
      const bridge = pciClass.startsWith(BRIDGE_CLASS);
      const cdevs = await readdir(join(devices, address, "vfio-dev")).catch(() => []);
      return { address, driver: driver === undefined ? undefined : basename(driver), bridge, cdev: cdevs[0] };
    }),
  );
}

/** Those whose drivers keep VFIO from having the group. */
export function hinderingNeighbours(neighbours: readonly Neighbour[]): Neighbour[] {
  return neighbours.filter(({ driver }) => driver !== undefined && !isVfioDriver(driver) && !HARMLESS.includes(driver));
}
