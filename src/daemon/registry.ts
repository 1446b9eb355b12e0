import { Deadline } from "../base/deadline.ts";
import { asError, VhostdError } from "../base/errors.ts";
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
import { type LeftVfInfo, leftVfInfo, type PfInfo, pfInfo, type VfInfo, vfInfo } from "./device-info.ts";
import { DeviceTable } from "./device-table.ts";
import { DomainTable } from "./domains.ts";
import { namedFrontend } from "./front-end-kind.ts";
import { Adoption } from "./ha/adoption.ts";
import { forgetFailed, keepLeft } from "./ha/failed-vf.ts";
import { renewPfs } from "./ha/renew-pfs.ts";
import { hasMemory, type OpenedVf, type StoredVf } from "./ha/stored-vf.ts";
import type { Keeper } from "./keeper.ts";
import { endUnkept, leaveMigrations } from "./leaving.ts";
import type { ManualLog } from "./manual-logging.ts";
import { type LoggingOperation, MANUAL_STATUS, type ManualOperation } from "./manual-operations.ts";
import { migrationEvent } from "./migration.ts";
import type { OpenRings } from "./open-rings.ts";
import { Pf, type PfSurroundings } from "./pf.ts";
import { type LeftVf, leftOf, liveOf, vfExists, vfMigrating } from "./presence.ts";
import { type PfRecord, parsePfRecord } from "./record.ts";
import { Renewal } from "./renewal.ts";
import { parseVmUuid } from "./uuid.ts";
import { Vf } from "./vf.ts";
import {
  type AddVf,
  controlOwner,
  guestOf,
  type LeftFunction,
  reviveFunction,
  UNMANAGED,
  type VfOptions,
  type VfSurroundings,
  vmOf,
} from "./vf-parts.ts";

/** More are refused: the existing stack's limit, which its users plan with. */
const MOST_VFS = 2048;

export interface RegistryEvent {
  readonly type: string;
  readonly [key: string]: Json;
}

/** The PFs and VFs of this daemon. Operations on different functions run side by side. */
export class DeviceRegistry {
  private leaving = false;
  private readonly table: DeviceTable;
  private adoption: Adoption | undefined;
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
      readonly isOurs?: VfSurroundings["isOurs"];
    },
  ) {
    const spaces = options.spaces ?? addressSpaces();
    this.table = new DeviceTable(options.bus);
    options.keeper.onReturn?.(() => this.writeAll());
    this.domains = new DomainTable(options.keeper, spaces);
    const deadlines = { ...DEADLINES, ...options.deadlines };
    this.around = {
      deadlines,
      plugins: options.plugins,
      keeper: options.keeper,
      log: options.log,
      domains: this.domains,
      ...(options.isOurs === undefined ? {} : { isOurs: options.isOurs }),
      renew: (address) => this.renew(address),
      stillHeld: async (entry, deadline) => {
        // The kernel would name this process.
        if (this.table.usesGroupOf(entry)) return undefined;
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
  async addPf(address: PciAddress): Promise<PfInfo> {
    this.table.checkNewPf(address);
    return await this.noted(this.attachPf(address));
  }

  private async attachPf(address: PciAddress): Promise<PfInfo> {
    this.table.pfs.set(address, "adding");
    try {
      const entry = await this.table.find(address, "pfNotFound");
      const pf = await Pf.attach(address, entry, this.pfSurroundings);
      await using undo = new AsyncDisposableStack();
      undo.use(pf);
      await this.options.keeper.put(`pf/${address}`, () => pf.snapshot());
      undo.move();
      this.table.pfs.set(address, { live: pf });
    } catch (error) {
      this.table.pfs.delete(address);
      throw error;
    }
    this.emit({ type: "pf", pf: address, state: "added" });
    return this.infoOfPf(this.table.livePf(address));
  }

  /** It is in service, or comes or goes. */
  hasPf(address: PciAddress): boolean {
    return this.table.pfs.has(address);
  }

  /** As hasPf, or it waits to be taken up. */
  hasVf(address: PciAddress): boolean {
    return this.table.vfs.has(address);
  }

  /** @throws VhostdError pfHasVfs, pfNotFound */
  async removePf(address: PciAddress): Promise<void> {
    const pf = this.table.livePf(address);
    const vfs = this.table.addressesOf(address);
    if (vfs.length > 0) {
      throw new VhostdError(
        "pfHasVfs",
        `PF ${address} still has ${vfs.length} VFs: ${vfs.slice(0, 4).join(", ")}${vfs.length > 4 ? ", …" : ""}`,
        {
          fix: 'remove them first, with "vf -r"',
        },
      );
    }
    this.table.pfs.set(address, "removing");
    try {
      await pf[Symbol.asyncDispose]();
      await this.options.keeper.delete(`pf/${address}`);
    } finally {
      // Opened again meanwhile it would not be a fresh one.
      if (pf.late === undefined) this.table.pfs.delete(address);
      else void pf.late.then(() => this.table.pfs.delete(address));
    }
    this.emit({ type: "pf", pf: address, state: "removed" });
  }

  listPfs(): PfInfo[] {
    return this.table.livePfs.map((pf) => this.infoOfPf(pf));
  }

  /** @throws VhostdError vfExists, socketInUse, socketPath, limitExceeded, vfNotFound, pfNotFound, or what attaching throws */
  addVf(wanted: AddVf): Promise<VfInfo> {
    return this.noted(this.attachVf(wanted));
  }

  /** @param left by an earlier process; until it is attached, and where it cannot be, its slot stays as it is */
  private async attachVf(wanted: AddVf, left?: { readonly rings: Json | undefined }): Promise<VfInfo> {
    const { address } = wanted;
    if (left === undefined && this.table.vfs.has(address)) throw vfExists(address, this.table.vfs.get(address)?.slot);
    const uuid = parseVmUuid(wanted.uuid);
    const options: VfOptions = {
      address,
      socket: this.table.checkSocket(wanted.socket, address),
      mode: wanted.mode,
      ...(uuid === undefined ? {} : { uuid }),
      ...(wanted.unmanaged === true ? { unmanaged: true } : {}),
      ...(wanted.hostNotifier === false ? { hostNotifier: false } : {}),
      ...namedFrontend(wanted.frontend),
    };
    if (left === undefined) this.checkCount();
    const entry = await this.table.find(address, "vfNotFound");
    const parent = await this.table.parentOf(options, entry);
    // Looked up while others may have run: the slot is taken without a wait in between.
    if (left === undefined && this.table.vfs.has(address)) throw vfExists(address, this.table.vfs.get(address)?.slot);
    this.table.checkSocket(options.socket, address);
    if (options.unmanaged === true) this.table.checkUnmanaged(address, entry);
    const mover = this.moverOf(options, parent);
    const place = { socket: options.socket, pf: entry.physfn };
    if (left === undefined) this.table.vfs.set(address, { slot: "adding", ...place });
    let vf: Vf;
    try {
      const lost = this.lostRings.get(address);
      // Another VM has rings of its own.
      const rings = lost?.vm === guestOf(options) ? lost.rings : undefined;
      vf = await Vf.attach(options, entry, mover, this.around, { rings, storedRings: left?.rings });
    } catch (error) {
      if (left === undefined) this.table.vfs.delete(address);
      throw error;
    }
    this.lostRings.delete(address);
    this.table.vfs.set(address, { slot: { live: vf }, ...place });
    return vfInfo(vf);
  }

  /**
   * @param force also while its VM is migrated
   * @returns a warning, where its function was given away and somebody can go on using it
   * @throws VhostdError vfNotFound, busy
   */
  async removeVf(address: PciAddress, { force = false } = {}): Promise<string | undefined> {
    await this.adoption?.hurry(address);
    await this.renewals.get(address)?.end();
    this.renewals.delete(address);
    const left = this.table.leftVf(address);
    const entry = this.table.vfs.get(address);
    if (entry !== undefined && left?.failed !== undefined) {
      // Nothing but its name is here.
      entry.slot = "removing";
      await forgetFailed(this.options.keeper, address).finally(() => this.table.vfs.delete(address));
      return undefined;
    }
    const vf = this.table.liveVf(address);
    if (vf.isMigrating && !force) throw vfMigrating(address);
    if (entry !== undefined) entry.slot = "removing";
    try {
      return await vf.remove();
    } finally {
      // Opened again meanwhile it would not be a fresh one.
      if (vf.closing === undefined) this.table.vfs.delete(address);
      else void vf.closing.then(() => this.table.vfs.delete(address));
      if (vf.rings.trouble !== undefined) this.lostRings.set(address, { vm: guestOf(vf.options), rings: vf.rings });
    }
  }

  /**
   * Changes the internal status of a managed VF by hand, or only asks for it.
   * @throws VhostdError vfNotFound, notSupported, quiesceFailed, freezeFailed, adminQueue
   */
  async moveVf(address: PciAddress, operation: ManualOperation): Promise<InternalStatusName> {
    await this.adoption?.hurry(address);
    return await this.table.liveVf(address).move(MANUAL_STATUS[operation]);
  }

  /** Begins or ends to log the pages that a VF writes. @throws VhostdError vfNotFound; see ManualLogging */
  async logVf(address: PciAddress, operation: LoggingOperation, form?: MapForm): Promise<ManualLog> {
    await this.adoption?.hurry(address);
    const { byHand } = this.table.liveVf(address).target;
    return await (operation === "start-logging" ? byHand.start(form) : byHand.stop());
  }

  /** The VFs of one PF, or all of them. @throws VhostdError pfNotFound */
  listVfs(pf?: PciAddress): VfInfo[] {
    return this.table.vfsOf(pf).flatMap(({ slot }) => (liveOf(slot) === undefined ? [] : [vfInfo(liveOf(slot)!)]));
  }

  /** As listVfs: those of an earlier process that wait to be taken up, or cannot be. @throws VhostdError pfNotFound */
  listLeftVfs(pf?: PciAddress): LeftVfInfo[] {
    return this.table
      .vfsOf(pf)
      .flatMap(({ slot }) => leftOf(slot) ?? [])
      .map(leftVfInfo);
  }

  /** @throws VhostdError vfNotFound */
  vfInfo(address: PciAddress): VfInfo {
    return vfInfo(this.table.liveVf(address));
  }

  /**
   * What each of a VF's queues has done, by index; null where its device does not count, or does not say so soon.
   * @throws VhostdError vfNotFound
   */
  async vfStats(address: PciAddress): Promise<readonly QueueStats[] | null> {
    await this.adoption?.hurry(address);
    return await this.table.liveVf(address).queueStats();
  }

  /**
   * Goes on with what the keeper has, as an earlier process left it: PFs and DMA domains are taken up, VFs wait for `takeUp`
   * when this resolves. Without a policy of adoption there is nothing.
   * @throws what the keeper does
   */
  async collect(): Promise<void> {
    const { keeper, log, plugins } = this.options;
    const policy = plugins.adoption;
    if (policy === undefined) return;
    this.adoption = new Adoption({
      ...{ keeper, log, policy },
      revivePf: (record, fds, deadline) => this.revivePf(parsePfRecord(record), fds, deadline),
      reviveDomain: (record, fds) => this.domains.revive(record, fds),
      takeUpDomains: (deadline) => this.domains.takeUp(deadline),
      openVf: (stored) => this.openVf(stored),
      reviveVf: (stored) => this.reviveVf(stored),
      pruneDomains: () => this.pruneDomains(),
      renewPfs: (others) => {
        const add = (address: PciAddress) => this.noted(this.attachPf(address));
        return renewPfs({ table: this.table, add, log, time: this.around.deadlines.stats }, others);
      },
      attachVf: async (options, rings) => void (await this.noted(this.attachVf(options, { rings }))),
      leaveVf: (left) => this.leaveVf(left),
    });
    try {
      await this.adoption.collect(Deadline.after(this.around.deadlines.takeUp, "taking up DMA domains"));
    } catch (error) {
      // Nobody is to wait for it.
      this.adoption = undefined;
      throw error;
    }
  }

  /** Takes up the VFs of an earlier process. Never rejects: what cannot be taken up is logged, the others go on. */
  async takeUp(): Promise<void> {
    await this.adoption?.run();
    this.adoption = undefined;
  }

  /** `collect` and `takeUp`. */
  async revive(): Promise<void> {
    await this.collect();
    await this.takeUp();
  }

  /** What is under way ends, as far as the deadline lets it: another process goes on with everything. Never rejects. */
  async settle(deadline: Deadline): Promise<void> {
    this.leaving = true;
    const settled = Promise.all([...this.adding, ...this.table.liveVfs.map((vf) => vf.settled())]);
    // The adoption, too, ends with the deadline; until it has noted that, the end of this process counts as a death.
    await Promise.all([deadline.race(settled).catch(() => {}), this.adoption?.leave(deadline)]);
  }

  /** See leaveMigrations. No function is opened again from now on. */
  async leaveMigrations(deadline: Deadline): Promise<void> {
    this.leaving = true;
    await leaveMigrations(() => this.table.liveVfs, deadline);
  }

  /** VFs that the keeper does not have end in order: another process goes on with the others. Never rejects. */
  async endUnkept(deadline: Deadline): Promise<void> {
    this.leaving = true;
    const remove = (address: PciAddress) => this.removeVf(address, { force: true });
    await endUnkept({ keeper: this.options.keeper, live: () => this.table.liveVfs, remove }, deadline);
  }

  /** Removes all VFs, then all PFs; those that are just being added too. */
  async close(): Promise<void> {
    await Promise.allSettled(this.adding);
    await Promise.allSettled([...this.table.vfs.keys()].map((address) => this.removeVf(address, { force: true })));
    await Promise.allSettled([...this.table.pfs.keys()].map((address) => this.removePf(address)));
  }

  /** Drops every live object without a word to any function: what the death of the process does. */
  async abandon(): Promise<void> {
    await Promise.all([...this.renewals.values()].map((renewal) => renewal.end()));
    for (const vf of this.table.liveVfs) await vf.abandon();
    for (const pf of this.table.livePfs) pf.abandon();
    this.domains.abandon();
    this.table.vfs.clear();
    this.table.pfs.clear();
  }

  onEvent(handler: (event: RegistryEvent) => void): Disposable {
    this.handlers.add(handler);
    return { [Symbol.dispose]: () => void this.handlers.delete(handler) };
  }

  private async revivePf(record: PfRecord, fds: Map<string, OwnedFd>, deadline: Deadline): Promise<void> {
    const address = parsePciAddress(record.address);
    const entry = await this.table.find(address, "pfNotFound");
    const pf = Pf.revive(entry, record, fds, this.pfSurroundings);
    this.table.pfs.set(address, { live: pf });
    await pf.takeUp(deadline).catch((error) => {
      this.options.log.child(`pf ${address}`).error("memory of an earlier process stays mapped", asError(error));
    });
  }

  private async openVf({ record, options, fds }: StoredVf): Promise<LeftFunction> {
    const entry = await this.table.find(options.address, "vfNotFound");
    if (hasMemory(record) && !this.domains.isRevived(vmOf(options), entry.transport.kind)) {
      throw new VhostdError(
        "invalid",
        "what is mapped for its VM is not known: the record of that is missing or damaged",
      );
    }
    return reviveFunction(options, entry, record, fds, this.around);
  }

  private async reviveVf({ record, options, fds, left }: OpenedVf): Promise<void> {
    const { address } = options;
    const { entry } = left;
    await using undo = new AsyncDisposableStack();
    undo.defer(() => left.abandon());
    const parent = this.table.parentAddressOf(options, entry);
    // Its PF's entry has just been read, with a link for each of its VFs.
    const mover = this.moverOf(options, parent === undefined ? undefined : this.table.livePf(parent).entry);
    undo.move();
    const vf = await Vf.revive(left, record, fds, mover, this.around);
    this.table.vfs.set(address, { slot: { live: vf }, socket: options.socket, pf: entry.physfn });
  }

  private leaveVf(left: LeftVf): void {
    const { address, socket } = left.options;
    // Whose VF it is the bus says, where it still does.
    const pf = this.table.vfs.get(address)?.pf ?? this.table.parentNamed(address);
    this.table.vfs.set(address, { slot: { left }, socket, pf });
  }

  private async pruneDomains(): Promise<void> {
    // Those that come or go have memory of theirs, too.
    const here = [...this.table.vfs].filter(([, { slot }]) => leftOf(slot) === undefined);
    const owners = here.flatMap(([address]) => [address, controlOwner(address)]);
    await this.domains.prune(new Set(owners));
  }

  /** To a keeper that has nothing. What still waits to be taken up is written by those that it becomes. */
  private async writeAll(): Promise<void> {
    await this.adoption?.finished;
    const { keeper } = this.options;
    const there = this.table.livePfs.filter(({ reason }) => reason === null);
    for (const pf of there) await keeper.put(`pf/${pf.address}`, () => pf.snapshot());
    await this.domains.checkpointAll();
    await Promise.all(this.table.failedVfs.map((left) => keepLeft(keeper, left)));
    await Promise.all(this.table.liveVfs.map((vf) => vf.note()));
  }

  /** Opens the function of a VF again, which serves nobody any more, until it is open or the VF is removed. */
  private renew(address: PciAddress): void {
    const entry = this.table.vfs.get(address);
    // Who removes it closes it.
    const old = entry === undefined ? undefined : liveOf(entry.slot);
    if (entry === undefined || old === undefined || this.leaving) return;
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
    const entry = await this.table.find(address, "vfNotFound");
    const mover = this.moverOf(options, await this.table.parentOf(options, entry));
    // Who removes it waits for an attempt.
    const deadlines = { ...this.around.deadlines, attach: this.around.deadlines.close };
    return await Vf.attach(options, entry, mover, { ...this.around, deadlines }, before);
  }

  private checkCount(): void {
    if (this.table.vfs.size >= MOST_VFS) {
      throw new VhostdError("limitExceeded", `there are ${MOST_VFS} VFs already, the most`);
    }
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

  /** @throws VhostdError pfNotFound, vfIndex, busy */
  private moverOf({ address }: VfOptions, parent: BusEntry | undefined) {
    return parent === undefined ? UNMANAGED : this.table.livePf(parent.address).moverFor(address, parent);
  }

  private infoOfPf(pf: Pf): PfInfo {
    return pfInfo(pf, this.table.addressesOf(pf.address).length);
  }
}
