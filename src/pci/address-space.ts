import type { Deadline } from "../base/deadline.ts";
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
export interface AddressSpace {
  /** IOVA ranges that can be mapped, inclusive ends. */
  readonly ioRanges: readonly { readonly start: number; readonly end: number }[];
  /** Smallest unit of a mapping, bytes. */
  readonly pageSize: number;
  /** All that is mapped becomes reachable for the function too. */
  attach(fn: PciFunction, mapped: readonly (DmaRange & { readonly fd: number })[], deadline: Deadline): Promise<void>;
  /** Nothing is reachable for the function any more. */
  detach(fn: PciFunction, mapped: readonly DmaRange[], deadline: Deadline): Promise<void>;
  /** The fd is borrowed for the call. When it fails nothing of the range is mapped. */
  map(range: DmaRange, fd: number, deadline: Deadline): Promise<void>;
  unmap(range: DmaRange, deadline: Deadline): Promise<void>;
  /** Takes up a function that is attached already, ranges mapped, without a message to anyone (adoption). */
  adopt(fn: PciFunction): void;
}
