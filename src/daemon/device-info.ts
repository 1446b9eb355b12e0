import type { PciAddress } from "../pci/address.ts";
import type { FrontendKind } from "./front-end-kind.ts";
import type { MigrationInfo } from "./migration.ts";
import type { Pf, PfManagement } from "./pf.ts";
import type { LeftVf } from "./presence.ts";
import type { Vf } from "./vf.ts";
import type { VfManagement } from "./vf-parts.ts";

/** PFs and VFs as the control interface describes them. */

export interface PfInfo extends PfManagement {
  readonly pf: PciAddress;
  readonly class: string;
  readonly vfs: number;
  readonly kind: "software" | "vfio";
}

export interface VfInfo extends VfManagement {
  readonly vf: PciAddress;
  /** False while it waits to be taken up again after a restart. */
  readonly probed: boolean;
  readonly class: string;
  readonly pf: PciAddress | null;
  readonly msix_num: number;
  readonly queue_num: number;
  /** Entries. */
  readonly queue_size: number;
  readonly device_feature: bigint;
  readonly driver_feature: bigint | null;
  /** Bit to name, of the class's own features. */
  readonly class_feature_names: Readonly<Record<number, string>>;
  readonly config: Readonly<Record<string, string>>;
  readonly vm_uuid: string;
  readonly socket_file: string;
  readonly mode: "client" | "server";
  /** A front-end is connected, or what it left is being undone. */
  readonly connected: boolean;
  /** The guest's driver has set DRIVER_OK. */
  readonly configured: boolean;
  readonly state: string;
  readonly reason: string | null;
  /** It was added without a PF. */
  readonly unmanaged: boolean;
  /** A front-end may map its doorbells. */
  readonly host_notifier: boolean;
  /** The messages that its front-end has. */
  readonly frontend: FrontendKind;
  readonly interface: "vfio-user" | "group" | "iommufd" | null;
  readonly iommu_group: number | null;
  readonly numa_node: number | null;
  /** Of its VM, as far as it has come; null where it does not migrate. */
  readonly migration: MigrationInfo | null;
}

/** A VF of an earlier process that is not in service. */
export interface LeftVfInfo {
  readonly vf: PciAddress;
  readonly probed: false;
  readonly vm_uuid: string;
  readonly socket_file: string;
  readonly mode: "client" | "server";
  /** It was added without a PF. */
  readonly unmanaged: boolean;
  readonly state: "adopting" | "failed";
  readonly reason: string | null;
}

export function leftVfInfo({ options, failed }: LeftVf): LeftVfInfo {
  const { address, uuid, socket, mode, unmanaged } = options;
  return {
    vf: address,
    probed: false,
    vm_uuid: uuid ?? "",
    socket_file: socket,
    mode,
    unmanaged: unmanaged === true,
    state: failed === undefined ? "adopting" : "failed",
    reason: failed ?? null,
  };
}

/** @param vfs of it that are added */
export function pfInfo(pf: Pf, vfs: number): PfInfo {
  return {
    pf: pf.address,
    class: pf.deviceClass.name,
    vfs,
    kind: pf.entry.transport.kind === "vfio-user" ? "software" : "vfio",
    ...pf.management,
  };
}

export function vfInfo(vf: Vf): VfInfo {
  const { state, options, target } = vf;
  const { transport } = vf.entry;
  const ofKernel = transport.kind === "vfio" ? transport : undefined;
  return {
    vf: vf.address,
    probed: state.name !== "adopting",
    class: target.deviceClass.name,
    pf: vf.entry.physfn ?? null,
    msix_num: vf.parts.fn.interrupts.count,
    queue_num: target.queues,
    queue_size: target.queueSizeMax(0),
    device_feature: target.deviceFeatures,
    driver_feature: vf.driverFeatures,
    class_feature_names: target.deviceClass.features.names,
    config: vf.columns,
    vm_uuid: options.uuid ?? "",
    socket_file: options.socket,
    mode: options.mode,
    connected: vf.connected,
    configured: state.name === "running",
    state: state.name,
    reason: vf.reason,
    unmanaged: options.unmanaged === true,
    host_notifier: target.doorbellShare !== undefined,
    frontend: options.frontend ?? "standard",
    interface: ofKernel === undefined ? "vfio-user" : (vf.parts.domain.interface ?? null),
    iommu_group: ofKernel?.group ?? null,
    numa_node: ofKernel?.numaNode ?? null,
    migration: target.migration.info,
    ...vf.management,
  };
}
