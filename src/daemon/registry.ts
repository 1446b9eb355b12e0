import type { Deadline } from "../base/deadline.ts";
import { VhostdError } from "../base/errors.ts";
import type { Json } from "../base/json.ts";
import type { Logger } from "../base/log.ts";
import type { MapForm } from "../native/dirty-log.ts";
import type { OwnedFd } from "../native/fd.ts";
import { type PciAddress, parsePciAddress } from "../pci/address.ts";
import type { Bus, BusEntry } from "../pci/bus.ts";
import type { QueueStats } from "../pci/function.ts";
import { type AddressSpaces, addressSpaces } from "../pci/open.ts";
import { stillHeld } from "../pci/vfio/still-held.ts";
import type { PluginRegistry } from "../plugin-host.ts";
import type { InternalStatusName } from "../virtio/admin/vendor.ts";
import { DEADLINES, type Deadlines } from "./deadlines.ts";
import { type PfInfo, pfInfo, type VfInfo, vfInfo } from "./device-info.ts";
import { DomainTable } from "./domains.ts";
import { namedFrontend } from "./front-end-kind.ts";
import type { Keeper } from "./keeper.ts";
import { leaveMigrations } from "./leaving.ts";
import type { ManualLog } from "./manual-logging.ts";
import { type LoggingOperation, MANUAL_STATUS, type ManualOperation } from "./manual-operations.ts";
import { migrationEvent } from "./migration.ts";
import type { OpenRings } from "./open-rings.ts";
import { Pf, type PfSurroundings } from "./pf.ts";
import {
  liveIn,
  parentMissing,
  pfMissing,
  type Slot,
  stillClosing,
  type VfSlot,
  vfExists,
  vfMigrating,
  vfMissing,
} from "./presence.ts";
import { closing, optionsOf, type PfRecord, parsePfRecord, parseVfRecord, type VfRecord } from "./record.ts";
import { Renewal } from "./renewal.ts";
import { checkSocketPath } from "./socket-path.ts";
import { parseVmUuid } from "./uuid.ts";
import { Vf } from "./vf.ts";
import { type AddVf, controlOwner, guestOf, UNMANAGED, type VfOptions, type VfSurroundings } from "./vf-parts.ts";

/** More are refused: the existing stack's limit, which its users plan with. */
const MOST_VFS = 2048;

export interface RegistryEvent {
  readonly type: string;
  readonly [key: string]: Json;
}

/** The PFs and VFs of this daemon. Operations on different functions run side by side. */
export class DeviceRegistry {
  private leaving = false;
  private readonly pfs = new Map<PciAddress, Slot<Pf>>();
  private readonly vfs = new Map<PciAddress, VfSlot>();
  /** Of VFs that were removed, with their VM: a guest that comes back to rings which cannot go on is told so. */
  private readonly lostRings = new Map<PciAddress, { readonly vm: string; readonly rings: OpenRings }>();
  /** Adds that are under way. */
  private readonly adding = new Set<Promise<unknown>>();
  /** Of VFs whose functions were given away. */
  private readonly renewals = new Map<PciAddress, Renewal<Vf>>();
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
      /** Those of both transports unless said. */
      readonly spaces?: AddressSpaces;
      /** Others than the usual ones. */
      readonly deadlines?: Partial<Deadlines>;
      /** Another way than the usual one to find out who has a function open. */
      readonly stillHeld?: VfSurroundings["stillHeld"];
    },
  ) {
    const spaces = options.spaces ?? addressSpaces();
    this.domains = new DomainTable(options.keeper, spaces);
    const deadlines = { ...DEADLINES, ...options.deadlines };
    this.around = {
      deadlines,
      plugins: options.plugins,
      keeper: options.keeper,
      log: options.log,
      domains: this.domains,
      renew: (address) => this.renew(address),
      stillHeld: async (entry, deadline) => {
        // The kernel would name this process.
        if (this.usesGroupOf(entry)) return undefined;
        return await (options.stillHeld ?? stillHeld)(entry, deadline);
      },
      onMigration: (vf, info) => this.emit(migrationEvent(vf, info)),
      onState: ({ address, state, reason }) => this.emit({ type: "vf", vf: address, state: state.name, reason }),
    };
    this.pfSurroundings = {
      deadlines,
      spaces,
      plugins: options.plugins,
      log: options.log,
      onTrouble: (address, state, reason) => this.emit({ type: "pf", pf: address, state, reason }),
      // As long as the keeper has its fds, the kernel waits for somebody to let go of it.
      onGone: (address) => options.keeper.delete(`pf/${address}`),
      onMapped: (pf) => options.keeper.put(`pf/${pf.address}`, () => pf.snapshot()),
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
    return this.infoOfPf(this.livePf(address));
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
      // Opened again meanwhile it would not be a fresh one.
      if (pf.late === undefined) this.pfs.delete(address);
      else void pf.late.then(() => this.pfs.delete(address));
    }
    this.emit({ type: "pf", pf: address, state: "removed" });
  }

  listPfs(): PfInfo[] {
    return [...this.pfs.values()].flatMap((slot) => (typeof slot === "string" ? [] : [this.infoOfPf(slot.live)]));
  }

  /** @throws VhostdError vfExists, socketInUse, socketPath, limitExceeded, vfNotFound, pfNotFound, or what attaching throws */
  addVf(wanted: AddVf): Promise<VfInfo> {
    return this.noted(this.attachVf(wanted));
  }

  private async attachVf(wanted: AddVf): Promise<VfInfo> {
    const { address } = wanted;
    if (this.vfs.has(address)) throw vfExists(address, this.vfs.get(address)?.slot);
    const uuid = parseVmUuid(wanted.uuid);
    const options: VfOptions = {
      address,
      socket: this.checkSocket(wanted.socket),
      mode: wanted.mode,
      ...(uuid === undefined ? {} : { uuid }),
      ...(wanted.unmanaged === true ? { unmanaged: true } : {}),
      ...(wanted.hostNotifier === false ? { hostNotifier: false } : {}),
      ...namedFrontend(wanted.frontend),
    };
    if (this.vfs.size >= MOST_VFS)
      throw new VhostdError("limitExceeded", `there are ${MOST_VFS} VFs already, the most`);
    const entry = await this.find(address, "vfNotFound");
    const parent = await this.parentOf(options, entry);
    // Looked up while others may have run: the slot is taken without a wait in between.
    if (this.vfs.has(address)) throw vfExists(address, this.vfs.get(address)?.slot);
    this.checkSocket(options.socket);
    if (options.unmanaged === true) this.checkUnmanaged(address, entry);
    const mover = this.moverOf(options, parent);
    const place = { socket: options.socket, pf: entry.physfn };
    this.vfs.set(address, { slot: "adding", ...place });
    let vf: Vf;
    try {
      const lost = this.lostRings.get(address);
      // Another VM has rings of its own.
      const rings = lost?.vm === guestOf(options) ? lost.rings : undefined;
      vf = await Vf.attach(options, entry, mover, this.around, { rings });
    } catch (error) {
      this.vfs.delete(address);
      throw error;
    }
    this.lostRings.delete(address);
    this.vfs.set(address, { slot: { live: vf }, ...place });
    return vfInfo(vf);
  }

  /**
   * @param force also while its VM is migrated
   * @returns a warning, where its function was given away and somebody can go on using it
   * @throws VhostdError vfNotFound, busy
   */
  async removeVf(address: PciAddress, { force = false } = {}): Promise<string | undefined> {
    await this.renewals.get(address)?.end();
    this.renewals.delete(address);
    const vf = this.liveVf(address);
    if (vf.isMigrating && !force) throw vfMigrating(address);
    const entry = this.vfs.get(address);
    if (entry !== undefined) entry.slot = "removing";
    try {
      return await vf.remove();
    } finally {
      // Opened again meanwhile it would not be a fresh one.
      if (vf.closing === undefined) this.vfs.delete(address);
      else void vf.closing.then(() => this.vfs.delete(address));
      if (vf.rings.trouble !== undefined) this.lostRings.set(address, { vm: guestOf(vf.options), rings: vf.rings });
    }
  }

  /**
   * Changes the internal status of a managed VF by hand, or only asks for it.
   * @throws VhostdError vfNotFound, notSupported, quiesceFailed, freezeFailed, adminQueue
   */
  async moveVf(address: PciAddress, operation: ManualOperation): Promise<InternalStatusName> {
    return await this.liveVf(address).move(MANUAL_STATUS[operation]);
  }

  /** Begins or ends to log the pages that a VF writes. @throws VhostdError vfNotFound; see ManualLogging */
  async logVf(address: PciAddress, operation: LoggingOperation, form?: MapForm): Promise<ManualLog> {
    const { byHand } = this.liveVf(address).target;
    return await (operation === "start-logging" ? byHand.start(form) : byHand.stop());
  }

  /** The VFs of one PF, or all of them. @throws VhostdError pfNotFound */
  listVfs(pf?: PciAddress): VfInfo[] {
    if (pf !== undefined) this.livePf(pf);
    const vfs = [...this.vfs.values()].filter((vf) => pf === undefined || vf.pf === pf);
    return vfs.flatMap(({ slot }) => (typeof slot === "string" ? [] : [vfInfo(slot.live)]));
  }

  /** @throws VhostdError vfNotFound */
  vfInfo(address: PciAddress): VfInfo {
    return vfInfo(this.liveVf(address));
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

  /** See leaveMigrations. No function is opened again from now on. */
  async leaveMigrations(deadline: Deadline): Promise<void> {
    this.leaving = true;
    const live = () => [...this.vfs.values()].flatMap(({ slot }) => (typeof slot === "object" ? [slot.live] : []));
    await leaveMigrations(live, deadline);
  }

  /** Removes all VFs, then all PFs; those that are just being added too. */
  async close(): Promise<void> {
    await Promise.allSettled(this.adding);
    await Promise.allSettled([...this.vfs.keys()].map((address) => this.removeVf(address, { force: true })));
    await Promise.allSettled([...this.pfs.keys()].map((address) => this.removePf(address)));
  }

  /** Drops every live object without a word to any function: what the death of the process does. */
  async abandon(): Promise<void> {
    await Promise.all([...this.renewals.values()].map((renewal) => renewal.end()));
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
    const options = optionsOf(record);
    const parent = await this.parentOf(options, entry);
    const vf = await Vf.revive(entry, record, fds, this.moverOf(options, parent), this.around);
    this.vfs.set(address, { slot: { live: vf }, socket: options.socket, pf: entry.physfn });
  }

  /** Opens the function of a VF again, which serves nobody any more, until it is open or the VF is removed. */
  private renew(address: PciAddress): void {
    const entry = this.vfs.get(address);
    // Who removes it closes it.
    if (entry === undefined || typeof entry.slot === "string" || this.leaving) return;
    const old = entry.slot.live;
    const renewal = new Renewal({
      old,
      open: () => this.openAgain(old),
      onOpened: (live) => {
        this.renewals.delete(address);
        entry.slot = { live };
      },
      log: this.options.log.child(`vf ${address}`),
      interval: this.around.deadlines.renew,
    });
    this.renewals.set(address, renewal);
  }

  private async openAgain({ address, options, before }: Vf): Promise<Vf> {
    const entry = await this.find(address, "vfNotFound");
    const mover = this.moverOf(options, await this.parentOf(options, entry));
    // Who removes it waits for an attempt.
    const deadlines = { ...this.around.deadlines, attach: this.around.deadlines.close };
    return await Vf.attach(options, entry, mover, { ...this.around, deadlines }, before);
  }

  private usesGroupOf({ address, transport }: BusEntry): boolean {
    const live = [...this.vfs.values(), ...[...this.pfs.values()].map((slot) => ({ slot }))];
    const entries = live.flatMap(({ slot }) => (typeof slot === "string" ? [] : [slot.live.entry]));
    return entries.some(
      (other) =>
        other.address !== address &&
        transport.kind === "vfio" &&
        other.transport.kind === "vfio" &&
        other.transport.group === transport.group,
    );
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
    const gone = typeof slot === "string" ? null : slot.live.reason;
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
  private async parentOf({ address, unmanaged }: VfOptions, entry: BusEntry): Promise<BusEntry | undefined> {
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
    return await this.find(physfn, "pfNotFound");
  }

  /**
   * The kernel resets a PF that is opened or closed, and its VFs with it; who has a PF can reset it at any time.
   * @throws VhostdError busy
   */
  private checkUnmanaged(address: PciAddress, { physfn, virtfns }: BusEntry): void {
    if (physfn !== undefined && typeof this.pfs.get(physfn) === "string") this.livePf(physfn);
    if (virtfns.size === 0) return;
    throw new VhostdError("busy", `${address} has ${virtfns.size} VFs: a guest that has it could reset them`, {
      fix: `take its VFs away first (vfe-vhost-cli sriov ${address} 0), or serve those`,
    });
  }

  /** @throws VhostdError pfNotFound, vfIndex, busy */
  private moverOf({ address }: VfOptions, parent: BusEntry | undefined) {
    return parent === undefined ? UNMANAGED : this.livePf(parent.address).moverFor(address, parent);
  }

  /** The path in its shortest form. @throws VhostdError badArguments, socketPath, socketInUse */
  private checkSocket(path: string): string {
    const socket = checkSocketPath(path);
    for (const [address, vf] of this.vfs) {
      if (vf.socket !== socket) continue;
      throw new VhostdError("socketInUse", `${socket} is the socket of VF ${address} already`, {
        fix: "give each VF a socket of its own",
      });
    }
    return socket;
  }

  private infoOfPf(pf: Pf): PfInfo {
    return pfInfo(pf, this.addressesOf(pf.address).length);
  }

  private addressesOf(pf: PciAddress): PciAddress[] {
    return [...this.vfs].filter(([, vf]) => vf.pf === pf).map(([address]) => address);
  }

  private livePf(address: PciAddress): Pf {
    const slot = this.pfs.get(address);
    if (slot === undefined) {
      const vf = this.vfs.get(address);
      const parent = vf?.pf !== undefined && this.pfs.has(vf.pf) ? vf.pf : undefined;
      throw pfMissing(address, parent, vf === undefined ? this.addressesOf(address)[0] : address);
    }
    return liveIn(slot, `PF ${address}`);
  }

  private liveVf(address: PciAddress): Vf {
    const slot = this.vfs.get(address)?.slot;
    if (slot === undefined) throw vfMissing(address);
    return liveIn(slot, `VF ${address}`);
  }
}
