import type { Deadline } from "../../base/deadline.ts";
import type { Json } from "../../base/json.ts";
import type { OwnedFd } from "../../native/fd.ts";
import type { BusEntry, KernelTransport } from "../bus.ts";
import type { FunctionSnapshot } from "../function.ts";

/** A function that the kernel can be asked to open. */
export interface KernelEntry extends BusEntry {
  readonly transport: KernelTransport;
}

/** A function as the kernel opened it: reset, and unable to reach anything before it masters the bus or is attached. */
export interface OpenedDevice {
  readonly device: OwnedFd;
  /** To be called once, after the device fd was closed. */
  readonly leave: () => void;
}

export interface IommuSnapshot extends FunctionSnapshot {
  readonly data: { readonly [name: string]: Json };
}

/** An IOMMU address space as one of the kernel's two interfaces gives it. */
export interface Iommu {
  readonly kind: "group" | "iommufd";
  /** What can be mapped, inclusive ends; changes when functions are opened or attached. */
  readonly ranges: readonly { readonly start: number; readonly end: number }[];
  /** Smallest unit of a mapping, bytes. */
  readonly pageSize: number;
  /** @param token asked for only where the function takes one. @throws VhostdError; nothing is left open then */
  open(entry: KernelEntry, token: () => Promise<string>, deadline: Deadline): Promise<OpenedDevice>;
  /** What is mapped becomes reachable for the function. The fd is borrowed. @throws VhostdError; it reaches nothing then */
  attach(entry: KernelEntry, device: number, deadline: Deadline): Promise<void>;
  /** Nothing is reachable for the function any more. The fd is borrowed. */
  detach(device: number, deadline: Deadline): Promise<void>;
  /**
   * The pages of this process from `address` on become reachable, and stay in memory. Takes as long as the kernel does.
   * @throws SystemError; nothing of it is reachable then
   */
  map(iova: number, size: number, address: number): Promise<void>;
  /** As mapped. @returns bytes that are unmapped now; 0 where nothing was mapped there. @throws SystemError */
  unmap(iova: number, size: number): Promise<number>;
  /** How many mappings the kernel takes at a time; undefined where it sets no such limit. */
  readonly mappingLimit: number | undefined;
  /** What another process needs to go on with it. */
  snapshot(): IommuSnapshot;
  /** A function that another process has opened in it, and attached. @returns `leave`. @throws VhostdError invalid */
  adopt(entry: KernelEntry): () => void;
  /** All functions were adopted: what is held for others is let go. Left out where nothing is. */
  adoptedAll?(): void;
  /** What another process has mapped at `iova` is there. Left out where nobody counts. */
  adoptMapping?(iova: number): void;
  /**
   * What another process has mapped, exactly so, is found at `address` of this one. Left out where the kernel has no use for
   * a process that is no more.
   * @throws SystemError; VhostdError iommuDomain where it is not mapped. What is mapped stays so
   */
  takeUp?(iova: number, size: number, address: number): Promise<void>;
  /** Asks what can be mapped, which is known otherwise once a function was opened or attached. */
  refresh(deadline: Deadline): Promise<void>;
  /** After its functions. What is mapped still, is not any more, unless another process holds the same open file. */
  close(): Promise<void>;
}
