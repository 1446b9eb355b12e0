import { silentLogger } from "../../src/base/log.ts";
import { slowClose } from "../../src/native/slow.ts";
import type { AddressSpace, DmaRange } from "../../src/pci/address-space.ts";
import type { Iommu } from "../../src/pci/vfio/iommu.ts";
import { MappedMemory } from "../../src/pci/vfio/mapped-memory.ts";
import { PIECE_SIZE } from "../../src/pci/vfio/pieces.ts";
import { VfioUserAddressSpace } from "../../src/pci/vfio-user/address-space.ts";
import { LingeringSocket } from "../unit/native/lingering-socket.ts";

/**
 * Software functions whose guest memory is mapped as that of kernel VFIO is, by the same code, where there is much of it: only
 * the kernel's part is a system call that does nothing but take its time, on the thread on which the kernel would pin
 * memory. What is mapped so, the functions do not reach.
 */
export class SlowMapping implements Disposable {
  private readonly calls: LingeringSocket[];
  private readonly timers = new Set<ReturnType<typeof setTimeout>>();

  /**
   * @param size bytes that are mapped at most
   * @param time milliseconds for each gibibyte
   */
  constructor(
    size: number,
    private readonly time: number,
  ) {
    this.calls = Array.from({ length: Math.ceil(size / PIECE_SIZE) + 1 }, () => new LingeringSocket());
  }

  /** For the registry. */
  space(owner: string): AddressSpace {
    // Nothing is pinned: the file may be larger than the machine's memory.
    const room = async () => ({ [Symbol.dispose]: () => {} });
    return new SlowSpace(new MappedMemory(owner, silentLogger, room), this.iommu);
  }

  [Symbol.dispose](): void {
    for (const timer of this.timers) clearTimeout(timer);
    for (const call of this.calls) call[Symbol.dispose]();
  }

  private readonly iommu: Iommu = {
    kind: "group",
    ranges: [],
    pageSize: 4096,
    mappingLimit: undefined,
    open: () => Promise.reject(new Error("has no functions to open")),
    attach: async () => {},
    detach: async () => {},
    map: () => this.takeTime(),
    unmap: async (_iova, size) => size,
    close: async () => {},
    snapshot: () => ({ data: {}, fds: new Map() }),
    adopt: () => () => {},
    refresh: async () => {},
  };

  private async takeTime(): Promise<void> {
    const call = this.calls.pop();
    if (call === undefined) throw new Error("more is mapped than was said");
    const timer = setTimeout(() => call.release(), this.time);
    this.timers.add(timer);
    await slowClose(call.fd);
    this.timers.delete(timer);
  }
}

class SlowSpace extends VfioUserAddressSpace {
  constructor(
    private readonly memory: MappedMemory,
    private readonly iommu: Iommu,
  ) {
    super();
  }

  override async map(...[range, fd, deadline]: Parameters<AddressSpace["map"]>): Promise<void> {
    if (isBig(range)) await this.memory.map(this.iommu, range, fd, deadline);
    else await super.map(range, fd, deadline);
  }

  override async unmap(...[range, deadline]: Parameters<AddressSpace["unmap"]>): Promise<void> {
    if (isBig(range)) await this.memory.unmap(this.iommu, range, deadline);
    else await super.unmap(range, deadline);
  }
}

function isBig({ size }: DmaRange): boolean {
  return size >= PIECE_SIZE;
}
