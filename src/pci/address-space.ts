import type { Deadline } from "../base/deadline.ts";
import type { Json } from "../base/json.ts";
import type { OwnedFd } from "../native/fd.ts";
import type { BusEntry } from "./bus.ts";
import type { PciFunction } from "./function.ts";

/** A file as the kernel knows it, whatever the number of the fd. */
export interface FileIdentity {
  readonly dev: number;
  readonly ino: number;
}

/** A range of guest memory. Bytes. `iova` equals the guest-physical address. */
export interface DmaRange {
  readonly iova: number;
  readonly size: number;
  readonly file: FileIdentity;
  /** Where in the file the range begins. */
  readonly offset: number;
}

/**
 * One IOMMU address space, as the transport gives it: kernel VFIO has one container or IOAS for several functions,
 * vfio-user tells every server for itself. It does what it is told; what should be mapped is decided by DmaDomain.
 */
export interface AddressSpace extends Disposable {
  /**
   * IOVA ranges that can be mapped, inclusive ends. Kernel VFIO knows them only once a function has been opened, and they
   * may shrink with each further one.
   */
  readonly ioRanges: readonly { readonly start: number; readonly end: number }[];
  /** Smallest unit of a mapping, bytes. */
  readonly pageSize: number;
  /** Which of the kernel's interfaces it uses; undefined until that is decided, and where there is no choice. */
  readonly interface?: "group" | "iommufd" | undefined;
  /**
   * Opens a function that is to use this address space. The kernel lets a function be opened only inside one: such a
   * function could reach what is mapped already, but is reset and may not master the bus before it is attached.
   * @throws VhostdError; nothing is left open then
   */
  open(entry: BusEntry, deadline: Deadline): Promise<PciFunction>;
  /**
   * Goes on with a function as another process left it, without a message to it. Takes the fds.
   * @throws VhostdError invalid where the record or the fds do not fit
   */
  revive(entry: BusEntry, data: Json, fds: Map<string, OwnedFd>): PciFunction;
  /** All that is mapped becomes reachable for the function too. */
  attach(fn: PciFunction, mapped: readonly (DmaRange & { readonly fd: number })[], deadline: Deadline): Promise<void>;
  /** Nothing is reachable for the function any more. It is closed next. */
  detach(fn: PciFunction, mapped: readonly DmaRange[], deadline: Deadline): Promise<void>;
  /**
   * The fd is borrowed for the call. When it fails nothing of the range is mapped, but what `settle` is for.
   * @param cancelled asked where it takes long: nobody wants it any more
   */
  map(range: DmaRange, fd: number, deadline: Deadline, cancelled?: () => boolean): Promise<void>;
  unmap(range: DmaRange, deadline: Deadline): Promise<void>;
  /**
   * Unmaps what a map that failed could not unmap again. There where that can be; until it is so nothing more is mapped.
   * @throws VhostdError iommuDomain where it stays
   */
  settle?(deadline: Deadline): Promise<void>;
  /** Takes up a function that is attached already, ranges mapped, without a message to anyone (adoption). */
  adopt(fn: PciFunction): void;
  /** Closes what this process has of it: where nobody else holds it, nothing is mapped any more. After its functions. */
  [Symbol.dispose](): void;
}
