import { lstatSync, readdirSync, readFileSync, readlinkSync } from "node:fs";
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

/**
 * Functions by address, in directories laid out like /sys/bus/pci/devices. The first directory that has one wins. What is
 * read of them the kernel knows by heart, so it is read at once.
 */
export class Bus {
  constructor(private readonly directories: readonly string[]) {}

  /**
   * @returns undefined where no directory has the function
   * @throws VhostdError probeFailed where the entry is there but cannot be read
   */
  async find(address: PciAddress): Promise<BusEntry | undefined> {
    const directory = this.directories.map((parent) => join(parent, address)).find(exists);
    return directory === undefined ? undefined : readEntry(address, directory);
  }
}

function readEntry(address: PciAddress, directory: string): BusEntry {
  const socket = join(directory, SOCKET_NAME);
  return {
    address,
    directory,
    vendor: readNumber(directory, "vendor"),
    device: readNumber(directory, "device"),
    class: readNumber(directory, "class"),
    physfn: readFunctionLink(directory, "physfn"),
    virtfns: readVirtualFunctions(directory),
    transport: exists(socket) ? { kind: "vfio-user", socket } : readKernelTransport(directory),
  };
}

function readKernelTransport(directory: string): KernelTransport {
  const group = readLinkName(join(directory, "iommu_group"));
  const groupName = readText(join(directory, "iommu_group/name"));
  const pfDriver = readLinkName(join(directory, "physfn/driver"));
  const node = Number.parseInt(readText(join(directory, "numa_node")) ?? "-1", 10);
  return {
    kind: "vfio",
    driver: readLinkName(join(directory, "driver")),
    group: group === undefined || groupName?.trim() === NO_IOMMU_GROUP ? undefined : Number(group),
    cdev: readNames(join(directory, "vfio-dev")).find((name) => name.startsWith("vfio")),
    takesToken: exists(join(directory, "sriov_totalvfs")) || (pfDriver !== undefined && isVfioDriver(pfDriver)),
    numaNode: node < 0 ? undefined : node,
  };
}

/** The last part of what a link names, or undefined where it is not there. */
function readLinkName(path: string): string | undefined {
  const target = ifThere(() => readlinkSync(path), `${path} is not a link`);
  return target === undefined ? undefined : basename(target);
}

function readNames(directory: string): string[] {
  return ifThere(() => readdirSync(directory), `cannot read ${directory}`) ?? [];
}

/** undefined where there is no such attribute. */
function readText(path: string): string | undefined {
  return ifThere(() => readFileSync(path, "utf8"), `cannot read ${path}`);
}

/** Attributes are text: "0x1af4\n". */
function readNumber(directory: string, name: string): number {
  const path = join(directory, name);
  const text = readText(path);
  if (text === undefined) throw new VhostdError("probeFailed", `there is no ${path}`);
  if (!/^0x[0-9a-f]{1,6}$/i.test(text.trim())) {
    throw new VhostdError("probeFailed", `${path} says ${JSON.stringify(text.slice(0, 32))}; a hexadecimal number`);
  }
  return Number.parseInt(text, 16);
}

function readFunctionLink(directory: string, name: string): PciAddress | undefined {
  const target = readLinkName(join(directory, name));
  return target === undefined ? undefined : parsePciAddress(target);
}

function readVirtualFunctions(directory: string): Map<number, PciAddress> {
  const indices = readNames(directory)
    .map((name) => /^virtfn(\d+)$/.exec(name)?.[1])
    .filter((index) => index !== undefined)
    .map(Number)
    .sort((a, b) => a - b);
  const links = indices.map((index) => [index, readFunctionLink(directory, `virtfn${index}`)] as const);
  return new Map(links.filter((link): link is [number, PciAddress] => link[1] !== undefined));
}

function exists(path: string): boolean {
  return ifThere(() => lstatSync(path), `cannot look at ${path}`) !== undefined;
}

/** undefined where what is read is not there. @throws VhostdError probeFailed where it cannot be read otherwise */
function ifThere<T>(read: () => T, failure: string): T | undefined {
  try {
    return read();
  } catch (cause) {
    const code = cause instanceof Error && "code" in cause ? cause.code : undefined;
    if (code === "ENOENT" || code === "ENOTDIR") return undefined;
    throw new VhostdError("probeFailed", failure, { cause });
  }
}
