import { lstat, readdir, readFile, readlink } from "node:fs/promises";
import { basename, join } from "node:path";
import { VhostdError } from "../base/errors.ts";
import { type PciAddress, parsePciAddress } from "./address.ts";

/** How a function is reached. */
export type Transport = { readonly kind: "vfio-user"; readonly socket: string } | { readonly kind: "vfio" };

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
    : { kind: "vfio" };
  return { address, directory, vendor, device, class: pciClass, physfn, virtfns, transport };
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
