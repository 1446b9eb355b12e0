import { lstatSync } from "node:fs";
import { isAbsolute, resolve } from "node:path";
import { VhostdError } from "../base/errors.ts";
import type { Json } from "../base/json.ts";
import type { Logger } from "../base/log.ts";
import type { OwnedFd } from "../native/fd.ts";
import { type PciAddress, parsePciAddress } from "../pci/address.ts";
import type { Bus, BusEntry } from "../pci/bus.ts";
import type { QueueStats } from "../pci/function.ts";
import type { PluginRegistry } from "../plugin-host.ts";
import type { InternalStatusName } from "../virtio/admin/vendor.ts";
import { DEADLINES, type Deadlines } from "./deadlines.ts";
import { DomainTable } from "./domains.ts";
import type { Keeper } from "./keeper.ts";
import type { OpenRings } from "./open-rings.ts";
import { Pf, type PfManagement, type PfSurroundings } from "./pf.ts";
import { closing, type PfRecord, parsePfRecord, parseVfRecord, type VfRecord } from "./record.ts";
import { parseVmUuid } from "./uuid.ts";
import { Vf, type VfManagement } from "./vf.ts";
import { controlOwner, type VfOptions, type VfSurroundings } from "./vf-parts.ts";

/** More are refused: the existing stack's limit, which its users plan with. */
const MOST_VFS = 2048;
/** sun_path of unix(7), without the closing zero. */
const LONGEST_SOCKET_PATH = 107;

export interface PfInfo extends PfManagement {
  readonly pf: PciAddress;
  readonly class: string;
  readonly vfs: number;
  readonly kind: "software" | "vfio";
}

export interface VfInfo extends VfManagement {
  readonly vf: PciAddress;
  /** False while it waits to be taken up again after a restart. */
  readonly probed: boolean;
  readonly class: string;
  readonly pf: PciAddress | null;
  readonly msix_num: number;
  readonly queue_num: number;
  /** Entries. */
  readonly queue_size: number;
  readonly device_feature: bigint;
  readonly driver_feature: bigint | null;
  /** Bit to name, of the class's own features. */
  readonly class_feature_names: Readonly<Record<number, string>>;
  readonly config: Readonly<Record<string, string>>;
  readonly vm_uuid: string;
  readonly socket_file: string;
  readonly mode: "client" | "server";
  /** A front-end is connected, or what it left is being undone. */
  readonly connected: boolean;
  /** The guest's driver has set DRIVER_OK. */
  readonly configured: boolean;
  readonly state: string;
  readonly reason: string | null;
}

export interface AddVf {
  readonly address: PciAddress;
  readonly socket: string;
  readonly mode: "client" | "server";
  readonly uuid?: string;
}

/** What an operator may do to the internal status of a managed VF. */
const MANUAL_STATUS = { run: "running", quiesce: "quiesced", freeze: "freezed" } as const;
export const MANUAL_OPERATIONS = ["status", "run", "quiesce", "freeze"] as const;
export type ManualOperation = (typeof MANUAL_OPERATIONS)[number];

export interface RegistryEvent {
  readonly type: string;
  readonly [key: string]: Json;
}

/** A slot is taken as soon as an add begins, so that two adds of one address cannot meet. */
type Slot<T> = { readonly live: T } | "adding" | "removing";

/** The PFs and VFs of this daemon. Operations on different functions run side by side. */
export class DeviceRegistry {
  private readonly pfs = new Map<PciAddress, Slot<Pf>>();
  private readonly vfs = new Map<PciAddress, { slot: Slot<Vf>; readonly socket: string; readonly pf: PciAddress }>();
  /** Of VFs that were removed, with their VM: a guest that comes back to rings which cannot go on is told so. */
  private readonly lostRings = new Map<PciAddress, { readonly vm: string; readonly rings: OpenRings }>();
  /** Adds that are under way. */
  private readonly adding = new Set<Promise<unknown>>();
  private readonly domains: DomainTable;
  private readonly handlers = new Set<(event: RegistryEvent) => void>();
  private readonly around: VfSurroundings;
  private readonly pfSurroundings: PfSurroundings;

  constructor(
    private readonly options: {
      readonly bus: Bus;
      readonly plugins: PluginRegistry;
      readonly keeper: Keeper;
      readonly log: Logger;
      /** Others than the usual ones. */
      readonly deadlines?: Partial<Deadlines>;
    },
  ) {
    this.domains = new DomainTable(options.keeper);
    const deadlines = { ...DEADLINES, ...options.deadlines };
    this.around = {
      deadlines,
      plugins: options.plugins,
      keeper: options.keeper,
      log: options.log,
      domains: this.domains,
      onState: ({ address, state, reason }) => this.emit({ type: "vf", vf: address, state: state.name, reason }),
    };
    this.pfSurroundings = {
      deadlines,
      plugins: options.plugins,
      log: options.log,
      onTrouble: (address, state, reason) => this.emit({ type: "pf", pf: address, state, reason }),
    };
  }

  /** @throws VhostdError pfExists, pfNotFound, or what attaching throws */
  addPf(address: PciAddress): Promise<PfInfo> {
    return this.noted(this.attachPf(address));
  }

  private async attachPf(address: PciAddress): Promise<PfInfo> {
    this.checkNewPf(address);
    this.pfs.set(address, "adding");
    try {
      const entry = await this.find(address, "pfNotFound");
      const pf = await Pf.attach(address, entry, this.pfSurroundings);
      await using undo = new AsyncDisposableStack();
      undo.use(pf);
      await this.options.keeper.put(`pf/${address}`, () => pf.snapshot());
      undo.move();
      this.pfs.set(address, { live: pf });
    } catch (error) {
      this.pfs.delete(address);
      throw error;
    }
    this.emit({ type: "pf", pf: address, state: "added" });
    return this.pfInfo(this.livePf(address));
  }

  /** @throws VhostdError pfHasVfs, pfNotFound */
  async removePf(address: PciAddress): Promise<void> {
    const pf = this.livePf(address);
    const vfs = this.addressesOf(address);
    if (vfs.length > 0) {
      throw new VhostdError(
        "pfHasVfs",
        `PF ${address} still has ${vfs.length} VFs: ${vfs.slice(0, 4).join(", ")}${vfs.length > 4 ? ", …" : ""}`,
        {
          fix: 'remove them first, with "vf -r"',
        },
      );
    }
    this.pfs.set(address, "removing");
    try {
      await pf[Symbol.asyncDispose]();
      await this.options.keeper.delete(`pf/${address}`);
    } finally {
      this.pfs.delete(address);
    }
    this.emit({ type: "pf", pf: address, state: "removed" });
  }

  listPfs(): PfInfo[] {
    return [...this.pfs.values()].flatMap((slot) => (typeof slot === "string" ? [] : [this.pfInfo(slot.live)]));
  }

  /** @throws VhostdError vfExists, socketInUse, socketPath, limitExceeded, vfNotFound, pfNotFound, or what attaching throws */
  addVf(wanted: AddVf): Promise<VfInfo> {
    return this.noted(this.attachVf(wanted));
  }

  private async attachVf(wanted: AddVf): Promise<VfInfo> {
    const { address } = wanted;
    if (this.vfs.has(address)) throw this.vfExists(address);
    const uuid = parseVmUuid(wanted.uuid);
    const options: VfOptions = {
      address,
      socket: this.checkSocket(wanted.socket),
      mode: wanted.mode,
      ...(uuid === undefined ? {} : { uuid }),
    };
    if (this.vfs.size >= MOST_VFS)
      throw new VhostdError("limitExceeded", `there are ${MOST_VFS} VFs already, the most`);
    const entry = await this.find(address, "vfNotFound");
    const pf = this.checkParent(address, entry);
    const parent = await this.find(pf, "pfNotFound");
    // Looked up while others may have run: the slot is taken without a wait in between.
    if (this.vfs.has(address)) throw this.vfExists(address);
    this.checkSocket(options.socket);
    this.livePf(pf);
    this.vfs.set(address, { slot: "adding", socket: options.socket, pf });
    let vf: Vf;
    try {
      const mover = this.livePf(pf).moverFor(address, parent);
      const lost = this.lostRings.get(address);
      // Another VM has rings of its own.
      const rings = lost?.vm === guestOf(options) ? lost.rings : undefined;
      vf = await Vf.attach(options, entry, mover, this.around, rings);
    } catch (error) {
      this.vfs.delete(address);
      throw error;
    }
    this.lostRings.delete(address);
    this.vfs.set(address, { slot: { live: vf }, socket: options.socket, pf });
    return this.infoOf(vf);
  }

  /** @throws VhostdError vfNotFound */
  async removeVf(address: PciAddress): Promise<void> {
    const vf = this.liveVf(address);
    const entry = this.vfs.get(address);
    if (entry !== undefined) entry.slot = "removing";
    try {
      await vf.remove();
    } finally {
      this.vfs.delete(address);
      if (vf.rings.trouble !== undefined) this.lostRings.set(address, { vm: guestOf(vf.options), rings: vf.rings });
    }
  }

  /**
   * Changes the internal status of a managed VF by hand, or only asks for it.
   * @throws VhostdError vfNotFound, notSupported, quiesceFailed, freezeFailed, adminQueue
   */
  async moveVf(address: PciAddress, operation: ManualOperation): Promise<InternalStatusName> {
    return await this.liveVf(address).move(operation === "status" ? undefined : MANUAL_STATUS[operation]);
  }

  /** The VFs of one PF. @throws VhostdError pfNotFound */
  listVfs(pf: PciAddress): VfInfo[] {
    this.livePf(pf);
    return this.addressesOf(pf).flatMap((address) => {
      const slot = this.vfs.get(address)?.slot;
      return slot === undefined || typeof slot === "string" ? [] : [this.infoOf(slot.live)];
    });
  }

  /** @throws VhostdError vfNotFound */
  vfInfo(address: PciAddress): VfInfo {
    return this.infoOf(this.liveVf(address));
  }

  /**
   * What each of a VF's queues has done, by index; null where its device does not count, or does not say so soon.
   * @throws VhostdError vfNotFound
   */
  async vfStats(address: PciAddress): Promise<readonly QueueStats[] | null> {
    return await this.liveVf(address).queueStats();
  }

  /**
   * Goes on with what the keeper has, as an earlier process left it: PFs, DMA domains, then VFs. What cannot be taken
   * up is logged and left out; the others go on.
   */
  async revive(): Promise<void> {
    const { keeper, log } = this.options;
    const keys = await keeper.list();
    const kinds = {
      pf: (record: Json, fds: Map<string, OwnedFd>) => this.revivePf(parsePfRecord(record), fds),
      domain: async (record: Json, fds: Map<string, OwnedFd>) => this.domains.revive(record, fds),
      vf: (record: Json, fds: Map<string, OwnedFd>) => this.reviveVf(parseVfRecord(record), fds),
    };
    for (const [kind, reviveOne] of Object.entries(kinds)) {
      for (const key of keys.filter((key) => key.startsWith(`${kind}/`))) {
        const stored = await keeper.get(key);
        if (stored === undefined) continue;
        try {
          await reviveOne(stored.record, stored.fds);
        } catch (error) {
          closing(stored.fds)[Symbol.dispose]();
          // As long as the keeper has the fds, function and front-end believe that somebody is there.
          await keeper.delete(key);
          log.error(`${key} could not be taken up again`, error);
        }
      }
    }
    const owners = [...this.vfs.keys()].flatMap((address) => [address, controlOwner(address)]);
    await this.domains.prune(new Set(owners));
  }

  /** Removes all VFs, then all PFs; those that are just being added too. */
  async close(): Promise<void> {
    await Promise.allSettled(this.adding);
    await Promise.allSettled([...this.vfs.keys()].map((address) => this.removeVf(address)));
    await Promise.allSettled([...this.pfs.keys()].map((address) => this.removePf(address)));
  }

  /** Drops every live object without a word to any function: what the death of the process does. */
  async abandon(): Promise<void> {
    for (const { slot } of this.vfs.values()) if (typeof slot !== "string") await slot.live.abandon();
    for (const slot of this.pfs.values()) if (typeof slot !== "string") slot.live.abandon();
    this.domains.abandon();
    this.vfs.clear();
    this.pfs.clear();
  }

  onEvent(handler: (event: RegistryEvent) => void): Disposable {
    this.handlers.add(handler);
    return { [Symbol.dispose]: () => void this.handlers.delete(handler) };
  }

  private async revivePf(record: PfRecord, fds: Map<string, OwnedFd>): Promise<void> {
    const address = parsePciAddress(record.address);
    const entry = await this.find(address, "pfNotFound");
    this.pfs.set(address, { live: Pf.revive(entry, record, fds, this.pfSurroundings) });
  }

  private async reviveVf(record: VfRecord, fds: Map<string, OwnedFd>): Promise<void> {
    const address = parsePciAddress(record.options.address);
    const entry = await this.find(address, "vfNotFound");
    const pf = this.checkParent(address, entry);
    const parent = await this.find(pf, "pfNotFound");
    const vf = await Vf.revive(entry, record, fds, this.livePf(pf).moverFor(address, parent), this.around);
    this.vfs.set(address, { slot: { live: vf }, socket: record.options.socket, pf });
  }

  private emit(event: RegistryEvent): void {
    for (const handler of this.handlers) handler(event);
  }

  private async noted<T>(add: Promise<T>): Promise<T> {
    this.adding.add(add);
    try {
      return await add;
    } finally {
      this.adding.delete(add);
    }
  }

  private async find(address: PciAddress, code: "pfNotFound" | "vfNotFound"): Promise<BusEntry> {
    const entry = await this.options.bus.find(address);
    if (entry === undefined) {
      throw new VhostdError(code, `no function ${address} on the bus directories of this daemon`, {
        fix: "check the address (lspci, or ls of vfe-softvf's devices directory) and the daemon's --bus options",
      });
    }
    return entry;
  }

  private checkNewPf(address: PciAddress): void {
    const slot = this.pfs.get(address);
    if (slot === undefined) return;
    const gone = typeof slot === "string" ? null : slot.live.reason;
    throw new VhostdError(
      "pfExists",
      `PF ${address} has been added already${gone === null ? "" : `, and is gone: ${gone}`}`,
      {
        fix: `nothing is to be done, or remove it first: vfe-vhost-cli mgmtpf -r ${address}`,
      },
    );
  }

  private vfExists(address: PciAddress): VhostdError {
    return new VhostdError("vfExists", `VF ${address} has been added already`, {
      fix: `nothing is to be done, or remove it first: vfe-vhost-cli vf -r ${address}`,
    });
  }

  private checkParent(address: PciAddress, entry: BusEntry): PciAddress {
    if (entry.physfn === undefined) {
      throw new VhostdError("vfNotFound", `${address} is not a virtual function`, {
        fix: 'PFs are added with "mgmtpf -a"',
      });
    }
    this.livePf(entry.physfn);
    return entry.physfn;
  }

  /** The path in its shortest form. @throws VhostdError badArguments, socketPath, socketInUse */
  private checkSocket(path: string): string {
    if (!isAbsolute(path)) {
      throw new VhostdError("badArguments", `the socket path ${JSON.stringify(path)} is not absolute`, {
        fix: "give the whole path: the working directory of the daemon is its own matter",
      });
    }
    const socket = resolve(path);
    const there = lstatSync(socket, { throwIfNoEntry: false });
    if (there !== undefined && !there.isSocket()) {
      throw new VhostdError("socketPath", `${socket} is there and is no socket`, { fix: "give another path" });
    }
    const length = Buffer.byteLength(socket);
    if (length > LONGEST_SOCKET_PATH) {
      throw new VhostdError(
        "socketPath",
        `the socket path has ${length} bytes, a unix socket takes ${LONGEST_SOCKET_PATH}`,
        {
          fix: "use a shorter path",
        },
      );
    }
    for (const [address, vf] of this.vfs) {
      if (vf.socket !== socket) continue;
      throw new VhostdError("socketInUse", `${socket} is the socket of VF ${address} already`, {
        fix: "give each VF a socket of its own",
      });
    }
    return socket;
  }

  private addressesOf(pf: PciAddress): PciAddress[] {
    return [...this.vfs].filter(([, vf]) => vf.pf === pf).map(([address]) => address);
  }

  private livePf(address: PciAddress): Pf {
    const slot = this.pfs.get(address);
    if (slot === undefined) {
      const parent = this.vfs.get(address)?.pf;
      if (parent !== undefined) {
        throw new VhostdError("pfNotFound", `${address} is a VF of PF ${parent}`, { fix: `name the PF, ${parent}` });
      }
      throw new VhostdError("pfNotFound", `PF ${address} has not been added`, {
        fix: `vfe-vhost-cli mgmtpf -a ${address}`,
      });
    }
    if (typeof slot === "string")
      throw new VhostdError("busy", `PF ${address} is ${slot === "adding" ? "being added" : "being removed"}`);
    return slot.live;
  }

  private liveVf(address: PciAddress): Vf {
    const slot = this.vfs.get(address)?.slot;
    if (slot === undefined) {
      throw new VhostdError("vfNotFound", `VF ${address} has not been added`, {
        fix: `add it with "vfe-vhost-cli vf -a ${address}"; "vf -l" lists those of a PF`,
      });
    }
    if (typeof slot === "string")
      throw new VhostdError("busy", `VF ${address} is ${slot === "adding" ? "being added" : "being removed"}`);
    return slot.live;
  }

  private pfInfo(pf: Pf): PfInfo {
    return {
      pf: pf.address,
      class: pf.deviceClass.name,
      vfs: this.addressesOf(pf.address).length,
      kind: pf.entry.transport.kind === "vfio-user" ? "software" : "vfio",
      ...pf.management,
    };
  }

  private infoOf(vf: Vf): VfInfo {
    const { state, options } = vf;
    return {
      vf: vf.address,
      probed: state.name !== "adopting",
      class: vf.deviceClass.name,
      pf: vf.pf ?? null,
      msix_num: vf.vectors,
      queue_num: vf.queues,
      queue_size: vf.queueSizeMax(0),
      device_feature: vf.deviceFeatures,
      driver_feature: vf.driverFeatures,
      class_feature_names: vf.deviceClass.features.names,
      config: vf.columns,
      vm_uuid: options.uuid ?? "",
      socket_file: options.socket,
      mode: options.mode,
      connected: vf.connected,
      configured: state.name === "running",
      state: state.name,
      reason: vf.reason,
      ...vf.management,
    };
  }
}

/** What tells one VM from another, as far as the operator says. */
function guestOf({ uuid, socket }: VfOptions): string {
  return uuid ?? socket;
}
