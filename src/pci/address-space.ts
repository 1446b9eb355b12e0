import type { Deadline } from "../base/deadline.ts";
import type { Json } from "../base/json.ts";
import type { OwnedFd } from "../native/fd.ts";
import type { BusEntry } from "./bus.ts";
import type { FunctionSnapshot, PciFunction } from "./function.ts";

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

/** What `AddressSpace.snapshot` gave in an earlier process, with descriptors that belong to whoever gets this. */
export interface StoredSpace {
  readonly data: Json;
  readonly fds: Map<string, OwnedFd>;
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
   * The same where it is not known whether the range is mapped: an earlier process died while it mapped or unmapped it, and
   * all of it, parts of it or nothing may be. Nothing of it is mapped afterwards.
   */
  unmapIfThere(range: DmaRange, deadline: Deadline): Promise<void>;
  /**
   * Unmaps what a map that failed could not unmap again. There where that can be; until it is so nothing more is mapped.
   * @throws VhostdError iommuDomain where it stays
   */
  settle?(deadline: Deadline): Promise<void>;
  /**
   * What a new process needs to go on with it: what it is made of, and descriptors that keep it, and so what is mapped, alive;
   * also what `settle` has still to unmap. Undefined as long as there is nothing, left out where there never is.
   */
  snapshot?(): FunctionSnapshot | undefined;
  /**
   * Makes mappings of an earlier process this one's. The kernel ties some to the process that made them; no device notices.
   * Called once after a revival, before anything is mapped or opened; where it fails functions go on, and it may be called again.
   * @param mapped all that is mapped for certain; the fds are borrowed for the call
   * @throws VhostdError outOfMemory where this process may not lock as much memory; iommuDomain where it is not mapped
   */
  takeUp?(mapped: readonly (DmaRange & { readonly fd: number })[], deadline: Deadline): Promise<void>;
  /** Takes up a function that is attached already, ranges mapped, without a message to anyone (adoption). */
  adopt(fn: PciFunction): void;
  /** Every function that an earlier process had here and that lives on was adopted: what is held for others is let go. */
  adoptedAll?(): void;
  /** Closes what this process has of it: where nobody else holds it, nothing is mapped any more. After its functions. */
  [Symbol.dispose](): void;
}
