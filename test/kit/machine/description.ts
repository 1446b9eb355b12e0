import type { KernelName } from "./image.ts";

/** The environment variable that says where a process in a machine finds its MachineDescription. */
export const DESCRIPTION_VARIABLE = "VFE_MACHINE";
/** Where the machine has what it is told while it runs (MachineRun.tell): a file that grows by lines. */
export const INPUT_INSIDE = "/run/machine/input";

/** What a machine is to be. */
export interface MachineOptions {
  readonly kernel: KernelName;
  /** With a network function that has 4 VFs, which needs the newer QEMU. */
  readonly sriov: boolean;
  /** MiB; 2048 unless said. */
  readonly memory?: number;
  /** 2 unless said. */
  readonly processors?: number;
  /** Width of the IOMMU's addresses: 48, or 39, which ends them at 512 GiB. */
  readonly addressBits?: 39 | 48;
}

/** "blk" and "net": functions behind a root port of their own. "sriov": the PF. "bridged": two of these share a group. */
export type FunctionKind = "blk" | "net" | "sriov" | "bridged";

/** One function of the machine, as QEMU was told. */
export interface FunctionDescription {
  readonly kind: FunctionKind;
  /** In QEMU: of `device_del`, and of `pcie_aer_inject_error`. */
  readonly id: string;
  /** PCI address of the root port that it is behind. Bus numbers are the kernel's to choose. */
  readonly port: string;
  /** PCI device number below the bridge that is behind that port. */
  readonly bridgeSlot?: number;
  /** Virtqueues for requests; of "net" and "sriov" pairs. */
  readonly queues: number;
  /** Each queue has a doorbell page of its own. */
  readonly pagePerVq: boolean;
  /** What a disk says when it is asked for its id. */
  readonly serial?: string;
  /** MiB of a disk. */
  readonly size?: number;
  readonly mac?: string;
}

/** What tests inside can ask for (inside.ts); a JSON file in the machine. */
export interface MachineDescription extends Required<MachineOptions> {
  /** How QEMU calls itself. */
  readonly qemu: "system" | "newer";
  readonly functions: readonly FunctionDescription[];
}

export const SRIOV_VFS = 4;
/** PCI device number of the first root port. */
const FIRST_PORT = 0x10;
/** MiB. */
const DISK_SIZE = 64;

type Wanted = Omit<FunctionDescription, "port" | "serial" | "size" | "mac" | "pagePerVq"> & {
  readonly pagePerVq?: boolean;
};

/**
 * The functions of every machine. Network functions are on one hub, which carries a frame of one to all others; a hub's
 * ports have one queue each, so there is one pair.
 */
const FUNCTIONS: readonly Wanted[] = [
  { kind: "blk", id: "blk0", queues: 1 },
  { kind: "blk", id: "blk1", queues: 2 },
  { kind: "blk", id: "blk2", queues: 4, pagePerVq: true },
  { kind: "net", id: "net0", queues: 1 },
  { kind: "net", id: "net1", queues: 1, pagePerVq: true },
  { kind: "sriov", id: "pf0", queues: 1 },
  { kind: "bridged", id: "bridged0", queues: 1, bridgeSlot: 1 },
  { kind: "bridged", id: "bridged1", queues: 1, bridgeSlot: 2 },
];

/** All that follows from the options. */
export function describe(options: MachineOptions): MachineDescription {
  const wanted = FUNCTIONS.filter(({ kind }) => kind !== "sriov" || options.sriov);
  let port = FIRST_PORT - 1;
  const functions = wanted.map((given, index): FunctionDescription => {
    if (given.bridgeSlot === undefined || given.bridgeSlot === 1) port++;
    const network = given.kind === "net" || given.kind === "sriov";
    return {
      pagePerVq: false,
      ...given,
      port: `0000:00:${port.toString(16).padStart(2, "0")}.0`,
      ...(network
        ? { mac: `52:54:00:00:00:${index.toString(16).padStart(2, "0")}` }
        : { serial: `serial-${given.id}`, size: DISK_SIZE }),
    };
  });
  return {
    memory: 2048,
    processors: 2,
    addressBits: 48,
    ...options,
    qemu: options.sriov ? "newer" : "system",
    functions,
  };
}
