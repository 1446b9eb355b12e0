import { Deadline } from "../base/deadline.ts";
import { asError, VhostdError } from "../base/errors.ts";
import type { Json } from "../base/json.ts";
import type { Logger } from "../base/log.ts";
import { OperationQueue } from "../base/operation-queue.ts";
import type { OwnedFd } from "../native/fd.ts";
import { type PciAddress, parsePciAddress } from "../pci/address.ts";
import type { StoredSpace } from "../pci/address-space.ts";
import type { BusEntry } from "../pci/bus.ts";
import { DmaDomain } from "../pci/dma-domain.ts";
import type { PciFunction } from "../pci/function.ts";
import type { AddressSpaces } from "../pci/open.ts";
import type { DeviceClass } from "../plugin.ts";
import type { PluginRegistry } from "../plugin-host.ts";
import { AdminQueue, type AdminQueueState } from "../virtio/admin/admin-queue.ts";
import { AdminRefusal } from "../virtio/admin/admin-request.ts";
import { LogMemory } from "../virtio/admin/log-memory.ts";
import { type AdminDiscovery, openAdmin } from "../virtio/admin/open-admin.ts";
import { TRACKING_LABEL, TRACKING_MODES, type TrackingModeName, vdevId } from "../virtio/admin/vendor.ts";
import { VendorAdmin } from "../virtio/admin/vendor-admin.ts";
import { VendorMover } from "../virtio/movers/vendor.ts";
import { VirtioPciDevice } from "../virtio/pci-device.ts";
import type { Deadlines } from "./deadlines.ts";
import { closing, joinFds, type PfRecord, RECORD_VERSION, type Snapshot, takeFds } from "./record.ts";
import { LOAD_PLUGIN, type VfMover } from "./vf-parts.ts";
import { whileThere } from "./while-there.ts";

/** Milliseconds for its VFs to leave alone what an earlier process had mapped. */
const CLEAN_UP_TIMEOUT = 15_000;

/** What a PF needs of the daemon around it. */
export interface PfSurroundings {
  readonly plugins: PluginRegistry;
  readonly spaces: AddressSpaces;
  readonly log: Logger;
  readonly deadlines: Deadlines;
  /** Something has changed for the worse, once and for all. */
  readonly onTrouble: (address: PciAddress, state: "gone" | "admin queue dead", reason: string) => void;
  /** The function is closed next: nothing of it is to be kept. */
  readonly onGone: (address: PciAddress) => Promise<void>;
  /** What is mapped for the PF changes, or has changed: its record is written. */
  readonly onMapped: (pf: Pf) => Promise<void>;
}

/** What a PF can do for its VFs. */
export interface PfManagement {
  /** It can freeze, save and restore its VFs. */
  readonly managed: boolean;
  /** The commands by which it does so and their version, "vendor 1.0.0"; null where it has none. */
  readonly migration: string | null;
  readonly admin_queue: "none" | AdminQueueState["kind"];
  /** How it can mark the pages that its VFs write, as it says; the best first. */
  readonly tracking: readonly (typeof TRACKING_LABEL)[TrackingModeName][];
  /** Why it is gone or cannot move the state of its VFs, or null. */
  readonly reason: string | null;
}

/** The live objects of one PF. */
interface PfParts {
  readonly fn: PciFunction;
  readonly device: VirtioPciDevice;
  /** Its own address space: the memory of its admin queue, never a guest's. */
  readonly domain: DmaDomain;
  readonly admin: AdminDiscovery;
  readonly deviceClass: DeviceClass;
}

/** A physical function that the daemon holds open on behalf of its VFs. */
export class Pf implements AsyncDisposable {
  readonly deviceClass: DeviceClass;
  private closed = false;
  /** Why the function is gone, or null. */
  private lost: string | null = null;
  private closing: Promise<void> | undefined;
  /** It was disposed of, and the kernel is still closing it: until this resolves. */
  late: Promise<void> | undefined;
  /** Milliseconds. */
  private readonly closeTimeout: number;
  private readonly log: Logger;
  private readonly onMapped: PfSurroundings["onMapped"];
  private readonly onGone: PfSurroundings["onGone"];
  /** Where it marks the pages that its VFs write. */
  private readonly logMemory: LogMemory;
  /** Of its VFs, one at a time. */
  private readonly standBys = new OperationQueue();

  private constructor(
    readonly address: PciAddress,
    readonly entry: BusEntry,
    private readonly parts: PfParts,
    { log, onTrouble, onGone, onMapped, deadlines }: PfSurroundings,
  ) {
    this.closeTimeout = deadlines.close;
    const { device, admin } = parts;
    this.deviceClass = parts.deviceClass;
    const own = log.child(`pf ${address}`);
    this.log = own;
    this.onMapped = onMapped;
    this.onGone = onGone;
    this.logMemory = new LogMemory(parts.domain);
    void device.gone.then((reason) => {
      if (this.closed) return;
      this.lost = reason.message;
      own.error("gone (remove it and add it again)", reason);
      onTrouble(address, "gone", reason.message);
      // One that is still there is left open until its VFs are gone: closing it resets them.
      if (reason instanceof VhostdError && reason.code === "io") return;
      // The kernel that wants it back waits for that, and for whoever else has its fds.
      this.close().catch((error) => own.warn("not all of it could be let go of", asError(error)));
    });
    if (admin.kind === "none") {
      own.info(`holds its VFs unmanaged: ${admin.reason}`);
      return;
    }
    own.info(`moves the state of its VFs by the vendor's admin commands, version ${admin.version}`);
    admin.admin.queue.onDead((error) => {
      if (this.closed || this.lost !== null) return;
      own.error("its VFs cannot be moved any more", error);
      onTrouble(address, "admin queue dead", error.message);
    });
  }

  /**
   * Opens the function and finds out what it can do for its VFs.
   * @throws VhostdError pfNotFound, pfDeviceId, pfFeatures, adminQueue or what opening throws; nothing is left open then
   */
  static async attach(address: PciAddress, entry: BusEntry, around: PfSurroundings): Promise<Pf> {
    if (entry.physfn !== undefined) {
      throw new VhostdError("pfNotFound", `${address} is a virtual function of ${entry.physfn}`, {
        fix: `add ${entry.physfn} as the PF, then this one with "vf -a"`,
      });
    }
    const deadline = Deadline.after(around.deadlines.attach, `attaching ${address}`);
    await using undo = new AsyncDisposableStack();
    // Before there is a PF, there is no record.
    let pf: Pf | undefined;
    const domain = new DmaDomain(around.spaces(entry.transport.kind, address), { note: async () => await pf?.note() });
    undo.defer(() => domain.abandon());
    const fn = undo.use(await domain.open(entry, deadline));
    const device = await whileThere(fn, deadline, () => VirtioPciDevice.probe(fn, deadline));
    const deviceClass = around.plugins.deviceClassById(device.virtioId);
    if (deviceClass === undefined) {
      throw new VhostdError(
        "pfDeviceId",
        `${address} has virtio device id ${device.virtioId}, which no plugin serves`,
        {
          fix: LOAD_PLUGIN,
        },
      );
    }
    const answer = Deadline.after(around.deadlines.admin, `the admin queue of ${address}`);
    const admin = await whileThere(fn, answer, async () => {
      await domain.attach(fn);
      undo.defer(() => domain.detach(fn));
      return await openAdmin(device, domain, deviceClass, answer);
    });
    undo.move();
    pf = new Pf(address, entry, { fn, device, domain, admin, deviceClass }, around);
    return pf;
  }

  /**
   * Goes on with a PF from its record and fds, without a word to it: `takeUp` is next.
   * @throws VhostdError where they do not fit; all fds are closed then
   */
  static revive(entry: BusEntry, record: PfRecord, fds: Map<string, OwnedFd>, around: PfSurroundings): Pf {
    using _unused = closing(fds);
    using undo = new DisposableStack();
    const address = parsePciAddress(record.address);
    const deviceClass = around.plugins.deviceClassById(record.layout.virtioId);
    if (deviceClass === undefined) {
      throw new VhostdError("pfDeviceId", `no plugin serves virtio device id ${record.layout.virtioId} any more`);
    }
    let pf: Pf | undefined;
    const makeSpace = (stored: StoredSpace | undefined) => around.spaces(entry.transport.kind, address, stored);
    const note = async () => await pf?.note();
    const domain = DmaDomain.revive(makeSpace, record.domain, takeFds(fds, "domain"), { note });
    undo.defer(() => domain.abandon());
    const fn = domain.reviveFunction(entry, record.function, takeFds(fds, "function"));
    undo.defer(() => fn.abandon());
    const device = new VirtioPciDevice(fn, record.layout);
    const admin = reviveAdmin(device, record.admin, takeFds(fds, "admin"));
    undo.move();
    pf = new Pf(address, entry, { fn, device, domain, admin, deviceClass }, around);
    return pf;
  }

  /**
   * Ends what was under way when the process before this one died, once, before its VFs are moved.
   * @throws VhostdError where memory stays mapped that should not be; the PF can be used all the same
   */
  async takeUp(deadline: Deadline): Promise<void> {
    const { domain } = this.parts;
    try {
      await domain.takeUp(deadline);
      await domain.adoptedAll();
    } finally {
      this.cleanUp();
    }
  }

  get management(): PfManagement {
    const { admin } = this.parts;
    if (admin.kind === "none") {
      return { managed: false, migration: null, admin_queue: "none", tracking: [], reason: this.lost ?? admin.reason };
    }
    const { state } = admin.admin.queue;
    const dead = state.kind === "dead" ? state.reason : null;
    return {
      managed: this.lost === null && dead === null,
      migration: `${admin.kind} ${admin.version}`,
      admin_queue: state.kind,
      tracking: admin.tracking.map((mode) => TRACKING_LABEL[mode]),
      reason: this.lost ?? (dead === null ? null : `its admin queue is dead: ${dead}`),
    };
  }

  /** Asks it for a sign of life: `reason` is right afterwards. Never rejects. */
  async look(deadline: Deadline): Promise<void> {
    await deadline.race(this.parts.device.status()).catch(() => {});
    // Of one that is gone this is said first.
    await new Promise(setImmediate);
  }

  /** Why the function is gone, or null. */
  get reason(): string | null {
    return this.lost;
  }

  /**
   * How the state of a VF of this PF is moved.
   * @param entry of this PF, read after the VF was found
   * @throws VhostdError vfIndex where the PF does not have it
   */
  moverFor(vf: PciAddress, entry: BusEntry): VfMover {
    const { admin } = this.parts;
    if (admin.kind === "none") return { make: undefined, unmanagedReason: () => this.lost ?? admin.reason };
    const found = [...entry.virtfns].find(([, address]) => address === vf);
    if (found === undefined) {
      throw new VhostdError("vfIndex", `${vf} is none of the ${entry.virtfns.size} VFs that ${this.address} names`, {
        fix: `look at the virtfn links in ${entry.directory}`,
      });
    }
    const tracking = { modes: admin.tracking, memory: this.logMemory, log: (text: string) => this.log.warn(text) };
    const managed = { admin: admin.admin, vdevId: vdevId(found[0]), tracking };
    return {
      make: (host, snapshot) => new VendorMover(host, managed, snapshot),
      unmanagedReason: () => this.management.reason ?? admin.admin.obstacle(managed.vdevId) ?? "its PF can move it",
      standBys: this.standBys,
    };
  }

  snapshot(): { record: PfRecord; fds: ReadonlyMap<string, number> } {
    const { fn, device, domain, admin } = this.parts;
    const queue = admin.kind === "none" ? undefined : admin.admin.queue.snapshot();
    const parts: Record<string, Snapshot | undefined> = {
      function: fn.snapshot(),
      domain: domain.snapshot(),
      admin: queue,
    };
    const record: PfRecord = {
      version: RECORD_VERSION,
      address: this.address,
      layout: device.layout,
      function: parts.function?.data ?? null,
      domain: parts.domain?.data ?? null,
      admin:
        admin.kind === "none"
          ? { kind: "none", reason: admin.reason }
          : { kind: "vendor", version: admin.version, tracking: [...admin.tracking], queue: queue?.data ?? null },
    };
    return { record, fds: joinFds(parts) };
  }

  private async note(): Promise<void> {
    if (!this.closed && this.lost === null) await this.onMapped(this);
  }

  /** Where an earlier process had pages marked: that ends, and is begun anew by who wants it. */
  private cleanUp(): void {
    const { admin } = this.parts;
    if (admin.kind === "none" || !this.logMemory.hasLeft) return;
    const { dirtyPages } = admin.admin;
    const deadline = Deadline.after(CLEAN_UP_TIMEOUT, `ending what an earlier process had ${this.address} mark`);
    const stop = async (index: number) => {
      // Of one whose pages are not marked it is refused.
      await dirtyPages.stop(vdevId(index), { address: 0 }, deadline, "once").catch((error) => {
        if (!(error instanceof AdminRefusal)) throw error;
      });
    };
    const stopped = Promise.all([...this.entry.virtfns.keys()].map(stop)).then(() => {});
    this.logMemory.clean(stopped).catch((error) => {
      if (!this.closed) this.log.warn("logs of an earlier process stay mapped", asError(error));
    });
  }

  /** Closes the admin queue and the function. */
  async [Symbol.asyncDispose](): Promise<void> {
    this.closed = true;
    try {
      await Deadline.after(this.closeTimeout, `closing ${this.address}`).race(this.close());
    } catch (error) {
      if (!(error instanceof VhostdError && error.code === "timedOut")) throw error;
      this.log.warn("the kernel is still closing it; until then it cannot be opened again", error);
      this.late = this.close().catch((cause) => this.log.warn("not all of it could be let go of", asError(cause)));
    }
  }

  private close(): Promise<void> {
    this.closing ??= this.closeParts();
    return this.closing;
  }

  private async closeParts(): Promise<void> {
    const { fn, domain, admin } = this.parts;
    await using steps = new AsyncDisposableStack();
    steps.defer(() => domain.abandon());
    steps.use(fn);
    steps.defer(() => domain.detach(fn));
    if (admin.kind === "vendor") steps.use(admin.admin.queue);
    // Before anything of it ends: a process that dies in the middle is not to go on with it.
    steps.defer(() => this.onGone(this.address));
  }

  /** Lets go of everything without a word to the function. */
  abandon(): void {
    this.closed = true;
    const { fn, domain, admin } = this.parts;
    if (admin.kind === "vendor") admin.admin.queue.abandon();
    domain.abandon();
    fn.abandon();
  }
}

function reviveAdmin(device: VirtioPciDevice, record: PfRecord["admin"], fds: Map<string, OwnedFd>): AdminDiscovery {
  if (record.kind === "none") return record;
  const queue = AdminQueue.revive(device, record.queue as Json, fds);
  const tracking = TRACKING_MODES.filter((mode) => record.tracking?.includes(mode) === true);
  return { kind: "vendor", admin: new VendorAdmin(queue), version: record.version, tracking };
}
