import { existsSync } from "node:fs";
import type { Deadline } from "../../base/deadline.ts";
import { VhostdError } from "../../base/errors.ts";
import type { Json } from "../../base/json.ts";
import { type Logger, silentLogger } from "../../base/log.ts";
import { OperationQueue } from "../../base/operation-queue.ts";
import type { OwnedFd } from "../../native/fd.ts";
import type { AddressSpace, DmaRange, StoredSpace } from "../address-space.ts";
import type { BusEntry } from "../bus.ts";
import type { FunctionSnapshot, PciFunction } from "../function.ts";
import { Type1Container } from "./container.ts";
import { VfioFunction } from "./function.ts";
import type { Iommu, KernelEntry, OpenedDevice } from "./iommu.ts";
import { IOMMUFD_FILE, IoAddressSpace, TokenNotTaken } from "./iommufd.ts";
import { MappedMemory, type Place, where } from "./mapped-memory.ts";
import { checkUsable } from "./opening.ts";
import { CONTAINER_FD, checkFds, groupFdName, IOMMUFD_FD, parseSpaceRecord } from "./record.ts";

/** Which of the kernel's interfaces is used: "auto" takes iommufd where the kernel has it for the function. */
export type VfioInterface = "auto" | "group" | "iommufd";

/** What kernel VFIO is used with. */
export interface VfioSettings {
  readonly interface: VfioInterface;
  /** The secret that PFs and their VFs are opened with, a UUID. Asked for only where the kernel takes one. */
  readonly token: () => Promise<string>;
  readonly log: Logger;
}

const DEFAULTS: VfioSettings = {
  interface: "auto",
  token: async () => {
    throw new VhostdError("accessDenied", "the kernel wants a vf-token, and there is none");
  },
  log: silentLogger,
};

/** Offset and bit in the configuration space of what lets a function read and write memory (PCI 3.0, 6.2.2). */
const COMMAND = 4;
const BUS_MASTER = 1 << 2;

/**
 * An IOMMU address space of the kernel: a type 1 container, or an IOAS of iommufd. Which one is decided by the first
 * function that is opened in it. Guest memory is pinned as long as it is mapped.
 */
export class VfioAddressSpace implements AddressSpace {
  private iommu: Iommu | undefined;
  private readonly memory: MappedMemory;
  /** Those that are open here, by what they are. */
  private readonly functions = new Map<PciFunction, { readonly fn: VfioFunction; readonly entry: KernelEntry }>();
  private readonly opening = new OperationQueue();
  /** What an earlier process may have left mapped; undefined where there was none, and once that was taken up. */
  private toTakeUp: readonly Place[] | undefined;
  private disposed = false;

  /** @param owner the VM or function whose memory it is, for the log */
  constructor(
    readonly owner: string,
    readonly settings: VfioSettings = DEFAULTS,
  ) {
    this.memory = new MappedMemory(owner, settings.log);
  }

  /**
   * Goes on with one as another process left it, without a word to the kernel: nothing can be mapped or opened before `takeUp`.
   * Takes the fds.
   * @throws VhostdError invalid where the record or the fds do not fit
   */
  static revive(owner: string, { data, fds }: StoredSpace, settings: VfioSettings = DEFAULTS): VfioAddressSpace {
    using undo = new DisposableStack();
    for (const fd of fds.values()) undo.use(fd);
    const space = new VfioAddressSpace(owner, settings);
    const record = parseSpaceRecord(data);
    const whose = `the address space of ${owner}`;
    if (record.interface === "group") {
      const names = [CONTAINER_FD, ...record.groups.map(groupFdName)];
      space.iommu = Type1Container.revive(record.groups, checkFds(fds, whose, names));
    } else {
      space.iommu = IoAddressSpace.revive(record.ioas, checkFds(fds, whose, [IOMMUFD_FD]));
    }
    space.toTakeUp = record.left;
    undo.move();
    return space;
  }

  snapshot(): FunctionSnapshot | undefined {
    if (this.iommu === undefined) return undefined;
    const { data, fds } = this.iommu.snapshot();
    return { data: { ...data, left: [...(this.toTakeUp ?? []), ...this.memory.left] }, fds };
  }

  /** Empty before the first function is attached. */
  get ioRanges(): Iommu["ranges"] {
    return this.iommu?.ranges ?? [];
  }

  get pageSize(): number {
    return this.iommu?.pageSize ?? 4096;
  }

  /** The interface in use; undefined before the first function is open. */
  get interface(): Iommu["kind"] | undefined {
    return this.iommu?.kind;
  }

  async open(entry: BusEntry, deadline: Deadline): Promise<PciFunction> {
    const kernelEntry = asKernelEntry(entry);
    const { device, leave } = await this.opening.run(() => this.openDevice(kernelEntry, deadline));
    const opening = this.listed(leave);
    const fn = await VfioFunction.over(kernelEntry, device, opening.leave, deadline);
    opening.list(fn, kernelEntry);
    return fn;
  }

  revive(entry: BusEntry, data: Json, fds: Map<string, OwnedFd>): PciFunction {
    using undo = new DisposableStack();
    for (const fd of fds.values()) undo.use(fd);
    const kernelEntry = asKernelEntry(entry);
    const reviving = this.listed(this.inUse().adopt(kernelEntry));
    undo.move();
    const fn = VfioFunction.revive(kernelEntry, reviving.leave, data, fds);
    reviving.list(fn, kernelEntry);
    return fn;
  }

  async attach(
    fn: PciFunction,
    mapped: readonly (DmaRange & { readonly fd: number })[],
    deadline: Deadline,
  ): Promise<void> {
    const opened = this.openedHere(fn);
    const iommu = this.inUse();
    this.checkTakenUp();
    await this.settle(deadline);
    // The first of all brings in what is mapped, which the kernel cannot do for a process that is no more.
    if (this.functions.size === 1) await this.memory.renew(iommu, mapped, deadline);
    await iommu.attach(opened.entry, opened.fn.deviceFd, deadline);
  }

  async detach(fn: PciFunction, _mapped: readonly DmaRange[], deadline: Deadline): Promise<void> {
    const opened = this.functions.get(fn);
    // Closed: it reaches nothing.
    if (opened === undefined) return;
    const { config, deviceFd } = opened.fn;
    try {
      const command = await deadline.race(config.read(COMMAND, 2));
      if ((command & BUS_MASTER) !== 0) await deadline.race(config.write(COMMAND, 2, command & ~BUS_MASTER));
    } finally {
      await this.inUse().detach(deviceFd, deadline);
    }
  }

  async map(range: DmaRange, fd: number, deadline: Deadline, cancelled?: () => boolean): Promise<void> {
    this.checkTakenUp();
    await this.memory.map(this.inUse(), range, fd, deadline, cancelled);
  }

  async unmap(range: DmaRange, deadline: Deadline): Promise<void> {
    await this.memory.unmap(this.inUse(), range, deadline);
  }

  async unmapIfThere(range: DmaRange, deadline: Deadline): Promise<void> {
    await this.memory.unmapIfThere(this.inUse(), range, deadline);
  }

  async settle(deadline: Deadline): Promise<void> {
    if (this.iommu !== undefined) await this.memory.settle(this.iommu, deadline);
  }

  async takeUp(mapped: readonly (DmaRange & { readonly fd: number })[], deadline: Deadline): Promise<void> {
    // No function was ever opened here.
    if (this.iommu === undefined && mapped.length === 0) return;
    const iommu = this.inUse();
    this.memory.adopt(iommu, mapped, this.toTakeUp ?? []);
    this.toTakeUp = undefined;
    await iommu.refresh(deadline);
    await this.memory.takeUp(iommu, mapped, deadline);
  }

  /** Revived functions are here already, as those are that were opened. */
  adopt(fn: PciFunction): void {
    this.openedHere(fn);
  }

  adoptedAll(): void {
    this.iommu?.adoptedAll?.();
  }

  /** To give memory back takes the kernel long: it goes on after this. */
  [Symbol.dispose](): void {
    if (this.disposed) return;
    this.disposed = true;
    const finish = () => this.memory.dispose(async () => await this.iommu?.close());
    this.opening
      .run(finish)
      .catch((error) => this.settings.log.error(`memory of ${this.owner} is not given back`, error));
  }

  /** One after the other: the first decides on the interface. */
  private async openDevice(entry: KernelEntry, deadline: Deadline): Promise<OpenedDevice> {
    deadline.check();
    if (this.disposed) throw new VhostdError("invalid", `the address space of ${this.owner} is no more`);
    this.checkTakenUp();
    checkUsable(entry);
    if (this.iommu !== undefined) {
      this.checkNothingForeign(this.iommu, entry);
      return await this.iommu.open(entry, this.settings.token, deadline);
    }
    const wanted = this.settings.interface;
    const hasCdev = entry.transport.cdev !== undefined && existsSync(IOMMUFD_FILE);
    if (wanted === "iommufd" || (wanted === "auto" && hasCdev)) {
      try {
        return await this.openFirst(entry, await IoAddressSpace.make(deadline, wanted === "auto"), deadline);
      } catch (error) {
        if (wanted === "iommufd" || !(error instanceof TokenNotTaken)) throw error;
      }
    }
    return await this.openFirst(entry, await Type1Container.make(deadline), deadline);
  }

  private async openFirst(entry: KernelEntry, iommu: Iommu, deadline: Deadline): Promise<OpenedDevice> {
    try {
      const opened = await iommu.open(entry, this.settings.token, deadline);
      this.iommu = iommu;
      return opened;
    } catch (error) {
      await iommu.close();
      throw error;
    }
  }

  private inUse(): Iommu {
    if (this.iommu === undefined) {
      throw new VhostdError("invalid", `no function of ${this.owner} was opened: there is no IOMMU to map memory in`);
    }
    return this.iommu;
  }

  /** What a kernel that ties mappings to processes would map for the function is anything but the guest's memory. */
  private checkNothingForeign(iommu: Iommu, { address }: KernelEntry): void {
    const { foreign } = this.memory;
    if (iommu.takeUp === undefined || foreign === undefined) return;
    throw new VhostdError(
      "iommuDomain",
      `${address} cannot be opened for ${this.owner}: guest memory ${where(foreign)} is mapped by an earlier process, and could not be taken up`,
      { fix: "see in the log why; then restart the daemon, or remove the VFs of this VM and add them again" },
    );
  }

  private checkTakenUp(): void {
    if (this.toTakeUp === undefined) return;
    throw new VhostdError("invalid", `what an earlier process has mapped for ${this.owner} was not taken up`);
  }

  /** A function that is about to be: in the list from `list` on until it has left. */
  private listed(leave: () => void) {
    let fn: PciFunction | undefined;
    return {
      list: (made: VfioFunction, entry: KernelEntry) => {
        fn = made;
        this.functions.set(made, { fn: made, entry });
      },
      leave: () => {
        if (fn !== undefined) this.functions.delete(fn);
        leave();
      },
    };
  }

  private openedHere(fn: PciFunction): { readonly fn: VfioFunction; readonly entry: KernelEntry } {
    const opened = this.functions.get(fn);
    if (opened === undefined) {
      throw new VhostdError("invalid", `${fn.address} was not opened in the address space of ${this.owner}`);
    }
    return opened;
  }
}

function asKernelEntry(entry: BusEntry): KernelEntry {
  const { transport } = entry;
  if (transport.kind === "vfio") return { ...entry, transport };
  throw new VhostdError(
    "invalid",
    `${entry.address} is not reached over kernel VFIO and cannot share this address space`,
  );
}
