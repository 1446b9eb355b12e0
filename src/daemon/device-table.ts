import { VhostdError } from "../base/errors.ts";
import type { PciAddress } from "../pci/address.ts";
import type { Bus, BusEntry } from "../pci/bus.ts";
import type { Pf } from "./pf.ts";
import {
  type LeftVf,
  leftOf,
  liveIn,
  liveOf,
  parentMissing,
  pfMissing,
  type Slot,
  stillClosing,
  type VfSlot,
  vfMissing,
} from "./presence.ts";
import { checkSocketPath } from "./socket-path.ts";
import type { Vf } from "./vf.ts";
import type { VfOptions } from "./vf-parts.ts";

/** Which PFs and VFs are there, and what may come beside them. */
export class DeviceTable {
  readonly pfs = new Map<PciAddress, Slot<Pf>>();
  readonly vfs = new Map<PciAddress, VfSlot>();

  constructor(private readonly bus: Bus) {}

  /** In service. */
  get livePfs(): Pf[] {
    return [...this.pfs.values()].flatMap((slot) => liveOf(slot) ?? []);
  }

  /** In service. */
  get liveVfs(): Vf[] {
    return [...this.vfs.values()].flatMap(({ slot }) => liveOf(slot) ?? []);
  }

  /** Of an earlier process: those that cannot be in service. */
  get failedVfs(): LeftVf[] {
    return [...this.vfs.values()]
      .flatMap(({ slot }) => leftOf(slot) ?? [])
      .filter(({ failed }) => failed !== undefined);
  }

  /** A VF of an earlier process that is not in service (yet). */
  leftVf(address: PciAddress): LeftVf | undefined {
    const slot = this.vfs.get(address)?.slot;
    return slot === undefined ? undefined : leftOf(slot);
  }

  /** Those of a PF, or all. @throws VhostdError pfNotFound */
  vfsOf(pf: PciAddress | undefined): VfSlot[] {
    if (pf !== undefined) this.livePf(pf);
    return [...this.vfs.values()].filter((vf) => pf === undefined || vf.pf === pf);
  }

  /** The PF in service that names this function as a VF of it. */
  parentNamed(vf: PciAddress): PciAddress | undefined {
    return this.livePfs.find(({ entry }) => [...entry.virtfns.values()].includes(vf))?.address;
  }

  /** @throws VhostdError with that code where it is on no bus directory */
  async find(address: PciAddress, code: "pfNotFound" | "vfNotFound"): Promise<BusEntry> {
    const entry = await this.bus.find(address);
    if (entry === undefined) {
      throw new VhostdError(code, `no function ${address} on the bus directories of this daemon`, {
        fix: "check the address (lspci, or ls of vfe-softvf's devices directory) and the daemon's --bus options",
      });
    }
    return entry;
  }

  /** A function of the same IOMMU group is in service: the kernel would name this process as its holder. */
  usesGroupOf({ address, transport }: BusEntry): boolean {
    const entries = [...this.liveVfs, ...this.livePfs].map(({ entry }) => entry);
    return entries.some(
      (other) =>
        other.address !== address &&
        transport.kind === "vfio" &&
        other.transport.kind === "vfio" &&
        other.transport.group === transport.group,
    );
  }

  /** @throws VhostdError pfExists, busy */
  checkNewPf(address: PciAddress): void {
    if (this.vfs.has(address)) {
      throw new VhostdError("pfExists", `${address} serves a guest itself, added with "vf -a … --unmanaged"`, {
        fix: `remove it there first: vfe-vhost-cli vf -r ${address}`,
      });
    }
    const [vf] = this.addressesOf(address);
    if (vf !== undefined && !this.pfs.has(address)) {
      throw new VhostdError("busy", `VF ${vf} of ${address} is in service: opening the PF would reset it`, {
        fix: `remove its VFs first (vfe-vhost-cli vf -r ${vf}), and add them after the PF`,
      });
    }
    const slot = this.pfs.get(address);
    if (slot === undefined) return;
    if (slot === "removing") throw stillClosing(`PF ${address}`);
    const gone = liveOf(slot)?.reason ?? null;
    throw new VhostdError(
      "pfExists",
      `PF ${address} has been added already${gone === null ? "" : `, and is gone: ${gone}`}`,
      {
        fix: `nothing is to be done, or remove it first: vfe-vhost-cli mgmtpf -r ${address}`,
      },
    );
  }

  /**
   * The PF by which a VF is managed; undefined for one that is added unmanaged.
   * @throws VhostdError vfNotFound where it is no VF, pfNotFound, busy
   */
  async parentOf(options: VfOptions, entry: BusEntry): Promise<BusEntry | undefined> {
    const parent = this.parentAddressOf(options, entry);
    return parent === undefined ? undefined : await this.find(parent, "pfNotFound");
  }

  /** As parentOf. @throws VhostdError vfNotFound, pfNotFound */
  parentAddressOf({ address, unmanaged }: VfOptions, entry: BusEntry): PciAddress | undefined {
    const { physfn } = entry;
    if (this.pfs.has(address)) {
      throw new VhostdError("vfNotFound", `${address} is in service as a PF`, {
        fix: `remove it there first: vfe-vhost-cli mgmtpf -r ${address}`,
      });
    }
    if (unmanaged === true) return undefined;
    if (physfn === undefined) {
      throw new VhostdError("vfNotFound", `${address} is not a virtual function`, {
        fix: 'PFs are added with "mgmtpf -a"; a function that serves a guest itself with "vf -a … --unmanaged"',
      });
    }
    if (!this.pfs.has(physfn)) throw parentMissing(entry, physfn);
    return physfn;
  }

  /**
   * The kernel resets a PF that is opened or closed, and its VFs with it; who has a PF can reset it at any time.
   * @throws VhostdError busy
   */
  checkUnmanaged(address: PciAddress, { physfn, virtfns }: BusEntry): void {
    if (physfn !== undefined && typeof this.pfs.get(physfn) === "string") this.livePf(physfn);
    if (virtfns.size === 0) return;
    throw new VhostdError("busy", `${address} has ${virtfns.size} VFs: a guest that has it could reset them`, {
      fix: `take its VFs away first (vfe-vhost-cli sriov ${address} 0), or serve those`,
    });
  }

  /**
   * The path in its shortest form.
   * @param of the VF that is to have it
   * @throws VhostdError badArguments, socketPath, socketInUse
   */
  checkSocket(path: string, of: PciAddress): string {
    const socket = checkSocketPath(path);
    for (const [address, vf] of this.vfs) {
      if (vf.socket !== socket || address === of) continue;
      throw new VhostdError("socketInUse", `${socket} is the socket of VF ${address} already`, {
        fix: "give each VF a socket of its own",
      });
    }
    return socket;
  }

  /** The VFs of a PF that are added. */
  addressesOf(pf: PciAddress): PciAddress[] {
    return [...this.vfs].filter(([, vf]) => vf.pf === pf).map(([address]) => address);
  }

  /** @throws VhostdError pfNotFound, busy */
  livePf(address: PciAddress): Pf {
    const slot = this.pfs.get(address);
    if (slot === undefined) {
      const vf = this.vfs.get(address);
      const parent = vf?.pf !== undefined && this.pfs.has(vf.pf) ? vf.pf : undefined;
      throw pfMissing(address, parent, vf === undefined ? this.addressesOf(address)[0] : address);
    }
    return liveIn(slot, `PF ${address}`);
  }

  /** @throws VhostdError vfNotFound, busy, vfRestoring, noDevice */
  liveVf(address: PciAddress): Vf {
    const slot = this.vfs.get(address)?.slot;
    if (slot === undefined) throw vfMissing(address);
    return liveIn(slot, `VF ${address}`);
  }
}
