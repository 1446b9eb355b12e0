import { lstat, readdir, readFile, readlink } from "node:fs/promises";
import { basename, join } from "node:path";
import { VhostdError } from "../base/errors.ts";
import { type PciAddress, parsePciAddress } from "./address.ts";

/** How a function is reached. */
export type Transport = { readonly kind: "vfio-user"; readonly socket: string } | KernelTransport;
export type TransportKind = Transport["kind"];

/** What sysfs says of a function of this machine. */
export interface KernelTransport {
  readonly kind: "vfio";
  /** The driver that has it, which `isVfioDriver` where VFIO can open it; undefined where none has. */
  readonly driver: string | undefined;
  /** Its IOMMU group; undefined where no IOMMU keeps it apart. */
  readonly group: number | undefined;
  /** The file of its own under /dev/vfio/devices, "vfio0", where the kernel makes such files. */
  readonly cdev: string | undefined;
  /** It is a PF that can have VFs, or a VF whose PF is bound to vfio-pci: the kernel takes a vf-token then, and only then. */
  readonly takesToken: boolean;
  /** The NUMA node it is nearest to; undefined where the machine has none. */
  readonly numaNode: number | undefined;
}

/** One function as its bus directory describes it. */
export interface BusEntry {
  readonly address: PciAddress;
  readonly directory: string;
  readonly vendor: number;
  readonly device: number;
  /** Class code, 24 bits. */
  readonly class: number;
  /** The PF of a VF. */
  readonly physfn: PciAddress | undefined;
  /** The VFs of a PF, by the index that its firmware knows them by. */
  readonly virtfns: ReadonlyMap<number, PciAddress>;
  readonly transport: Transport;
}

/** The socket beside the attributes of a function that is a process. */
const SOCKET_NAME = "vfio-user.sock";
/** The driver under which any function can be opened by VFIO. */
export const VFIO_DRIVER = "vfio-pci";
/** What the kernel names groups of functions that no IOMMU keeps apart (vfio's unsafe mode without an IOMMU). */
const NO_IOMMU_GROUP = "vfio-noiommu";

/** Whether the driver is vfio-pci, or one of its variants (mlx5_vfio_pci, virtio_vfio_pci and others). */
export function isVfioDriver(driver: string): boolean {
  return /(^|[-_])vfio[-_]pci$/.test(driver);
}

/** Whether the kernel takes a vf-token for the function. */
export function takesToken({ transport }: BusEntry): boolean {
  return transport.kind === "vfio" && transport.takesToken;
}

/** Functions by address, in directories laid out like /sys/bus/pci/devices. The first directory that has one wins. */
export class Bus {
  constructor(private readonly directories: readonly string[]) {}

  /**
   * @returns undefined where no directory has the function
   * @throws VhostdError probeFailed where the entry is there but cannot be read
   */
  async find(address: PciAddress): Promise<BusEntry | undefined> {
    for (const parent of this.directories) {
      const directory = join(parent, address);
      if (await exists(directory)) return readEntry(address, directory);
    }
    return undefined;
  }
}

async function readEntry(address: PciAddress, directory: string): Promise<BusEntry> {
  const [vendor, device, pciClass, physfn, virtfns, software] = await Promise.all([
    readNumber(directory, "vendor"),
    readNumber(directory, "device"),
    readNumber(directory, "class"),
    readFunctionLink(directory, "physfn"),
    readVirtualFunctions(directory),
    exists(join(directory, SOCKET_NAME)),
  ]);
  const transport: Transport = software
    ? { kind: "vfio-user", socket: join(directory, SOCKET_NAME) }
    : await readKernelTransport(directory);
  return { address, directory, vendor, device, class: pciClass, physfn, virtfns, transport };
}

async function readKernelTransport(directory: string): Promise<KernelTransport> {
  const [driver, group, groupName, cdevs, isPf, pfDriver, node] = await Promise.all([
    readLinkName(join(directory, "driver")),
    readLinkName(join(directory, "iommu_group")),
    readText(join(directory, "iommu_group/name")),
    readNames(join(directory, "vfio-dev")),
    exists(join(directory, "sriov_totalvfs")),
    readLinkName(join(directory, "physfn/driver")),
    readDecimal(join(directory, "numa_node")),
  ]);
  return {
    kind: "vfio",
    driver,
    group: group === undefined || groupName?.trim() === NO_IOMMU_GROUP ? undefined : Number(group),
    cdev: cdevs.find((name) => name.startsWith("vfio")),
    takesToken: isPf || (pfDriver !== undefined && isVfioDriver(pfDriver)),
    numaNode: node === undefined || node < 0 ? undefined : node,
  };
}

/** The last part of what a link names, or undefined where it is not there. */
async function readLinkName(path: string): Promise<string | undefined> {
  try {
    return basename(await readlink(path));
  } catch (error) {
    if (isMissing(error)) return undefined;
    throw new VhostdError("probeFailed", `${path} is not a link`, { cause: error });
  }
}

async function readNames(directory: string): Promise<string[]> {
  return await readdir(directory).catch((error) => {
    if (isMissing(error)) return [];
    throw new VhostdError("probeFailed", `cannot read ${directory}`, { cause: error });
  });
}

/** undefined where there is no such attribute. */
async function readText(path: string): Promise<string | undefined> {
  return await readFile(path, "utf8").catch((error) => {
    if (isMissing(error)) return undefined;
    throw new VhostdError("probeFailed", `cannot read ${path}`, { cause: error });
  });
}

/** undefined where there is no such attribute. */
async function readDecimal(path: string): Promise<number | undefined> {
  const text = await readText(path);
  return text === undefined ? undefined : Number.parseInt(text, 10);
}

/** Attributes are text: "0x1af4\n". */
async function readNumber(directory: string, name: string): Promise<number> {
  const path = join(directory, name);
  let text: string;
  try {
    text = await readFile(path, "utf8");
  } catch (cause) {
    throw new VhostdError("probeFailed", `cannot read ${path}`, { cause });
  }
  if (!/^0x[0-9a-f]{1,6}$/i.test(text.trim())) {
    throw new VhostdError("probeFailed", `${path} says ${JSON.stringify(text.slice(0, 32))}; a hexadecimal number`);
  }
  return Number.parseInt(text, 16);
}

async function readFunctionLink(directory: string, name: string): Promise<PciAddress | undefined> {
  let target: string;
  try {
    target = await readlink(join(directory, name));
  } catch (error) {
    if (isMissing(error)) return undefined;
    throw new VhostdError("probeFailed", `${join(directory, name)} is not a link to a function`, { cause: error });
  }
  return parsePciAddress(basename(target));
}

async function readVirtualFunctions(directory: string): Promise<Map<number, PciAddress>> {
  const indices = (await readdir(directory))
    .map((name) => /^virtfn(\d+)$/.exec(name)?.[1])
    .filter((index) => index !== undefined)
    .map(Number)
    .sort((a, b) => a - b);
  const links = await Promise.all(
    indices.map(async (index) => [index, await readFunctionLink(directory, `virtfn${index}`)] as const),
  );
  return new Map(links.filter((link): link is [number, PciAddress] => link[1] !== undefined));
}

async function exists(path: string): Promise<boolean> {
  try {
    await lstat(path);
    return true;
  } catch (error) {
    if (isMissing(error)) return false;
    throw error;
  }
}

function isMissing(error: unknown): boolean {
  return error instanceof Error && "code" in error && (error.code === "ENOENT" || error.code === "ENOTDIR");
}
