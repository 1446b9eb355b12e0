import type { Deadline } from "../../base/deadline.ts";
import { SystemError, VhostdError } from "../../base/errors.ts";
import { OwnedFd } from "../../native/fd.ts";
import { slowClose } from "../../native/slow.ts";
import type { Iommu, IommuSnapshot, KernelEntry, OpenedDevice } from "./iommu.ts";
import {
  DMA_UNMAP_VADDR,
  DmaMapFlag,
  Errno,
  failedWith,
  GROUP_STATUS,
  GROUP_VIABLE,
  request,
  TYPE1_DMA_MAP,
  TYPE1_DMA_UNMAP,
  TYPE1_INFO,
  VFIO_API_VERSION,
  VFIO_CHECK_EXTENSION,
  VFIO_GET_API_VERSION,
  VFIO_GROUP_GET_DEVICE_FD,
  VFIO_GROUP_GET_STATUS,
  VFIO_GROUP_SET_CONTAINER,
  VFIO_IOMMU_GET_INFO,
  VFIO_IOMMU_MAP_DMA,
  VFIO_IOMMU_UNMAP_DMA,
  VFIO_SET_IOMMU,
  VFIO_TYPE1V2_IOMMU,
} from "./iommu-uapi.ts";
import { type IovaRange, parseType1Info } from "./iova-ranges.ts";
import { KernelCalls } from "./kernel-calls.ts";
import { checkUsable, ignore, interruptsError, openFileOf, tokenError, whileBusy } from "./opening.ts";
import { CONTAINER_FD, groupFdName, type TakeFd } from "./record.ts";

const CONTAINER_FILE = "/dev/vfio/vfio";
/** Bytes of the first question for the IOMMU's properties; the kernel tells when its answer is longer. */
const INFO_SIZE = 4096;
const INFO_MAX = 1 << 20;

/** A group in the container. */
interface Group {
  readonly fd: OwnedFd;
  /** Functions of it that are open, or being opened. */
  users: number;
}

/**
 * A type 1 (v2) container. Groups join it, and with them all that is in it is reachable for their functions, which the kernel has
 * reset and keeps from mastering the bus. A container without groups has no IOMMU and loses what is mapped: the last group
 * stays until nothing is.
 */
export class Type1Container implements Iommu {
  readonly kind = "group";
  ranges: readonly IovaRange[] = [];
  pageSize = 4096;
  /** As the container had it when it was empty: dma_entry_limit of the module vfio_iommu_type1. */
  mappingLimit: number | undefined;
  private readonly groups = new Map<number, Group>();
  /** IOVAs of what is mapped. */
  private readonly mapped = new Set<number>();
  /** Groups without users stay meanwhile. */
  private readonly underWay = new Set<"joining" | "adopting">();
  /** Of groups that have left. */
  private closing: Promise<void> = Promise.resolve();

  private constructor(
    private readonly fd: OwnedFd,
    private readonly calls: KernelCalls,
  ) {}

  /** @throws VhostdError iommuContainer */
  static async make(deadline: Deadline): Promise<Type1Container> {
    const calls = new KernelCalls();
    await using undo = new AsyncDisposableStack();
    const fd = await openFileOf(CONTAINER_FILE, calls, deadline);
    undo.defer(() => slowClose(fd));
    const ask = (what: typeof VFIO_GET_API_VERSION, argument: number) =>
      calls.run(deadline, () => request(fd.number, what, argument), ignore);
    const [version, hasType1] = await Promise.all([
      ask(VFIO_GET_API_VERSION, 0),
      ask(VFIO_CHECK_EXTENSION, VFIO_TYPE1V2_IOMMU),
    ]);
    if (version !== VFIO_API_VERSION) {
      throw new VhostdError("iommuContainer", `the kernel's VFIO has version ${version}, must be ${VFIO_API_VERSION}`);
    }
    if (hasType1 === 0) {
      throw new VhostdError("iommuContainer", "the kernel's VFIO knows no type 1 (v2) IOMMU", {
        fix: "load the kernel module vfio_iommu_type1 (modprobe vfio_iommu_type1)",
      });
    }
    undo.move();
    return new Type1Container(fd, calls);
  }

  /**
   * Goes on with one as another process left it.
   * @param groups their numbers
   * @throws what `take` does
   */
  static revive(groups: readonly number[], take: TakeFd): Type1Container {
    const container = new Type1Container(take(CONTAINER_FD), new KernelCalls());
    for (const number of groups) container.groups.set(number, { fd: take(groupFdName(number)), users: 0 });
    container.underWay.add("adopting");
    return container;
  }

  snapshot(): IommuSnapshot {
    const groups = [...this.groups].map(([number, { fd }]) => [groupFdName(number), fd.number] as const);
    return {
      data: { interface: this.kind, groups: [...this.groups.keys()] },
      fds: new Map([[CONTAINER_FD, this.fd.number], ...groups]),
    };
  }

  adopt({ address, transport }: KernelEntry): () => void {
    const group = this.groups.get(transport.group ?? -1);
    if (group === undefined) {
      throw new VhostdError(
        "invalid",
        `${address} is in IOMMU group ${transport.group}, which is not in its container`,
      );
    }
    group.users++;
    return () => this.leave(group);
  }

  adoptedAll(): void {
    this.underWay.delete("adopting");
    this.retire();
  }

  adoptMapping(iova: number): void {
    this.mapped.add(iova);
  }

  /**
   * Pages stay where they are, and so do the functions' ways to them: it takes as long for any size. Before a group joins: the
   * kernel would look for the pages at the address that they had in the other process, in this one.
   */
  async takeUp(iova: number, size: number, address: number): Promise<void> {
    const flags = DMA_UNMAP_VADDR;
    const forget = TYPE1_DMA_UNMAP.encode({ argsz: TYPE1_DMA_UNMAP.size, flags, iova, size });
    await request(this.fd.number, VFIO_IOMMU_UNMAP_DMA, forget).catch((error) => {
      // Forgotten already: a process that took it up died between the two.
      if (!failedWith(error, Errno.EINVAL)) throw error;
    });
    const place = { vaddr: address, iova, size };
    const argument = TYPE1_DMA_MAP.encode({ argsz: TYPE1_DMA_MAP.size, flags: DmaMapFlag.vaddr, ...place });
    await request(this.fd.number, VFIO_IOMMU_MAP_DMA, argument).catch((cause) => {
      if (!failedWith(cause, Errno.ENOENT)) throw cause;
      throw new VhostdError("iommuDomain", `no ${size} bytes are mapped at 0x${iova.toString(16)}`, { cause });
    });
  }

  async refresh(deadline: Deadline): Promise<void> {
    // A container without groups has no IOMMU.
    if (this.groups.size > 0) await this.calls.run(deadline, () => this.readInfo(), ignore);
  }

  async open(entry: KernelEntry, token: () => Promise<string>, deadline: Deadline): Promise<OpenedDevice> {
    const number = checkUsable(entry);
    const name = entry.transport.takesToken ? `${entry.address} vf_token=${await token()}` : entry.address;
    const group = await this.join(entry, number, deadline);
    try {
      // EAGAIN: somebody else resets it, or a function of its bus.
      const device = await whileBusy(entry, [Errno.EAGAIN, Errno.EBUSY], deadline, () =>
        this.calls.run(deadline, () => openDevice(group.fd.number, name), slowClose),
      );
      return { device, leave: () => this.leave(group) };
    } catch (error) {
      this.leave(group);
      throw openError(entry, error);
    }
  }

  /** It was reachable from the open on; the driver of the function lets it master the bus. */
  async attach(): Promise<void> {}

  /** Whoever calls this has taken bus mastering from the function. */
  async detach(): Promise<void> {}

  async map(iova: number, size: number, address: number): Promise<void> {
    const flags = DmaMapFlag.read | DmaMapFlag.write;
    const argument = TYPE1_DMA_MAP.encode({ argsz: TYPE1_DMA_MAP.size, flags, vaddr: address, iova, size });
    await request(this.fd.number, VFIO_IOMMU_MAP_DMA, argument);
    this.mapped.add(iova);
  }

  async unmap(iova: number, size: number): Promise<number> {
    const argument = TYPE1_DMA_UNMAP.encode({ argsz: TYPE1_DMA_UNMAP.size, iova, size });
    try {
      await request(this.fd.number, VFIO_IOMMU_UNMAP_DMA, argument);
    } catch (error) {
      // Without groups there is no IOMMU that it could be mapped in.
      if (this.groups.size === 0 && failedWith(error, Errno.EINVAL)) return 0;
      throw error;
    }
    this.mapped.delete(iova);
    this.retire();
    return TYPE1_DMA_UNMAP.read(argument).size;
  }

  async close(): Promise<void> {
    await this.calls.idle();
    for (const { fd } of this.groups.values()) await slowClose(fd);
    this.groups.clear();
    await this.closing;
    await slowClose(this.fd);
  }

  /** One user more of the group, which is in the container then. Not to be called twice at a time. */
  private async join(entry: KernelEntry, number: number, deadline: Deadline): Promise<Group> {
    const there = this.groups.get(number);
    if (there !== undefined) {
      there.users++;
      return there;
    }
    // The last group takes the IOMMU along: it has to be known whether there is one.
    await deadline.race(Promise.all([this.closing, this.calls.idle()]));
    this.underWay.add("joining");
    try {
      const fd = await this.addGroup(entry, number, deadline);
      const group = { fd, users: 1 };
      this.groups.set(number, group);
      return group;
    } finally {
      this.underWay.delete("joining");
      this.retire();
    }
  }

  private addGroup(entry: KernelEntry, number: number, deadline: Deadline): Promise<OwnedFd> {
    const path = `/dev/vfio/${number}`;
    return whileBusy(entry, [Errno.EBUSY], deadline, async () => {
      await using undo = new AsyncDisposableStack();
      const fd = await openFileOf(path, this.calls, deadline);
      undo.defer(() => slowClose(fd));
      const status = GROUP_STATUS.encode({ argsz: GROUP_STATUS.size });
      await this.calls.run(deadline, () => request(fd.number, VFIO_GROUP_GET_STATUS, status), ignore);
      if ((GROUP_STATUS.read(status).flags & GROUP_VIABLE) === 0) {
        throw new SystemError(`IOMMU group ${number} is not viable`, Errno.EBUSY);
      }
      await this.calls.run(deadline, () => this.setContainer(entry, fd), ignore);
      await this.calls.run(deadline, () => this.readInfo(), ignore);
      undo.move();
      return fd;
    });
  }

  private async setContainer(entry: KernelEntry, group: OwnedFd): Promise<void> {
    const argument = new Uint8Array(4);
    new DataView(argument.buffer).setInt32(0, this.fd.number, true);
    try {
      await request(group.number, VFIO_GROUP_SET_CONTAINER, argument);
      if (this.groups.size === 0) await request(this.fd.number, VFIO_SET_IOMMU, VFIO_TYPE1V2_IOMMU);
    } catch (error) {
      throw joinError(entry, this.groups.size > 0, error);
    }
  }

  /** Which addresses can be mapped depends on all groups in the container. */
  private async readInfo(): Promise<void> {
    let answer = new Uint8Array(INFO_SIZE);
    for (;;) {
      TYPE1_INFO.write(answer, { argsz: answer.length });
      await request(this.fd.number, VFIO_IOMMU_GET_INFO, answer);
      const { argsz } = TYPE1_INFO.read(answer);
      if (argsz <= answer.length || argsz > INFO_MAX) break;
      answer = new Uint8Array(argsz);
    }
    const { pageSize, ranges, available } = parseType1Info(answer);
    if (ranges === undefined) {
      throw new VhostdError("iommuContainer", "the kernel does not tell which addresses its IOMMU can map", {
        fix: "use Linux 5.4 or newer",
      });
    }
    this.ranges = ranges;
    this.pageSize = Math.max(4096, pageSize ?? 0);
    if (available !== undefined) this.mappingLimit = available + this.mapped.size;
  }

  private leave(group: Group): void {
    group.users--;
    this.retire();
  }

  /** Groups without users leave: when the last fd of a group is closed the kernel takes it out of the container. */
  private retire(): void {
    if (this.underWay.size > 0) return;
    for (const [number, { fd, users }] of this.groups) {
      if (users > 0 || (this.groups.size === 1 && this.mapped.size > 0)) continue;
      this.groups.delete(number);
      this.closing = this.closing.then(() => slowClose(fd)).catch(() => {});
    }
  }
}

async function openDevice(group: number, name: string): Promise<OwnedFd> {
  return new OwnedFd(await request(group, VFIO_GROUP_GET_DEVICE_FD, new TextEncoder().encode(`${name}\0`)));
}

function openError(entry: KernelEntry, error: unknown): unknown {
  if (failedWith(error, Errno.EACCES)) return tokenError(entry, error);
  if (failedWith(error, Errno.ENODEV)) {
    return new VhostdError(
      "iommuGroupBind",
      `${entry.address} is not in its IOMMU group ${entry.transport.group} any more`,
      {
        fix: `bind it: vfe-vhost-cli bind ${entry.address}`,
        cause: error,
      },
    );
  }
  if (failedWith(error, Errno.EINVAL)) {
    return new VhostdError("vfioDeviceFd", `the kernel does not open ${entry.address}`, { cause: error });
  }
  return error;
}

function joinError(entry: KernelEntry, shared: boolean, cause: unknown): unknown {
  const { address } = entry;
  if (failedWith(cause, Errno.EPERM)) return interruptsError(entry, cause);
  if (shared && failedWith(cause, Errno.EINVAL)) {
    return new VhostdError(
      "iommuDomain",
      `the IOMMU of ${address} cannot map what the VM's other functions have mapped`,
      {
        fix: `see ${entry.directory}/iommu_group/reserved_regions, and move the guest's memory around them`,
        cause,
      },
    );
  }
  return cause;
}
