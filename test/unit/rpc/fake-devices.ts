import { VhostdError } from "../../../src/base/errors.ts";
import type { PfInfo, VfInfo } from "../../../src/daemon/device-info.ts";
import type { ManualLog } from "../../../src/daemon/manual-logging.ts";
import type { LoggingOperation, ManualOperation } from "../../../src/daemon/manual-operations.ts";
import type { Devices } from "../../../src/daemon/methods.ts";
import type { RegistryEvent } from "../../../src/daemon/registry.ts";
import type { AddVf } from "../../../src/daemon/vf-parts.ts";
import type { MapForm } from "../../../src/native/dirty-log.ts";
import type { PciAddress } from "../../../src/pci/address.ts";
import type { QueueStats } from "../../../src/pci/function.ts";
import type { InternalStatusName } from "../../../src/virtio/admin/vendor.ts";

/** The registry as the control interface sees it, without devices: every function of bus 5a exists. */
export class FakeDevices implements Devices {
  readonly pfs = new Map<PciAddress, PfInfo>();
  readonly vfs = new Map<PciAddress, VfInfo>();
  /** Of VFs that count. */
  readonly stats = new Map<PciAddress, readonly QueueStats[]>();
  readonly internal = new Map<PciAddress, InternalStatusName>();
  readonly handlers = new Set<(event: RegistryEvent) => void>();
  /** What removeVf warns of. */
  warning: string | undefined;
  /** addVf waits for it. */
  gate: Promise<void> = Promise.resolve();

  async addPf(pf: PciAddress): Promise<PfInfo> {
    if (!pf.startsWith("0000:5a:")) throw new VhostdError("pfNotFound", `no function ${pf}`, { fix: "check --bus" });
    if (this.pfs.has(pf)) throw new VhostdError("pfExists", `PF ${pf} has been added already`);
    const info: PfInfo = {
      ...{ pf, class: "net", vfs: 0, kind: "software" },
      ...{ managed: true, migration: "vendor 1.0.0", admin_queue: "ready", tracking: [], reason: null },
    };
    this.pfs.set(pf, info);
    this.emit({ type: "pf", pf, state: "added" });
    return info;
  }

  async removePf(pf: PciAddress): Promise<void> {
    this.pf(pf);
    if (this.listVfs(pf).length > 0) throw new VhostdError("pfHasVfs", `PF ${pf} still has VFs`);
    this.pfs.delete(pf);
    this.emit({ type: "pf", pf, state: "removed" });
  }

  listLeftVfs(): [] {
    return [];
  }

  listPfs(): PfInfo[] {
    return [...this.pfs.values()];
  }

  async addVf({
    address,
    socket,
    mode,
    uuid = "",
    unmanaged = false,
    hostNotifier,
    frontend = "standard",
  }: AddVf): Promise<VfInfo> {
    await this.gate;
    const pf = unmanaged ? null : this.pf(`${address.slice(0, 8)}00.0` as PciAddress).pf;
    const more = { unmanaged, host_notifier: hostNotifier !== false, frontend };
    const info = vfInfo(address, pf, { socket_file: socket, mode, vm_uuid: uuid, ...more });
    this.vfs.set(address, info);
    return info;
  }

  async removeVf(vf: PciAddress): Promise<string | undefined> {
    this.vfInfo(vf);
    this.vfs.delete(vf);
    return this.warning;
  }

  listVfs(pf?: PciAddress): VfInfo[] {
    if (pf !== undefined) this.pf(pf);
    return [...this.vfs.values()].filter((info) => pf === undefined || info.pf === pf);
  }

  vfInfo(vf: PciAddress): VfInfo {
    const info = this.vfs.get(vf);
    if (info === undefined) throw new VhostdError("vfNotFound", `VF ${vf} has not been added`, { fix: "add it" });
    return info;
  }

  async vfStats(vf: PciAddress): Promise<readonly QueueStats[] | null> {
    this.vfInfo(vf);
    return this.stats.get(vf) ?? null;
  }

  async moveVf(vf: PciAddress, operation: ManualOperation): Promise<InternalStatusName> {
    const info = this.vfInfo(vf);
    if (!info.managed) throw new VhostdError("notSupported", `VF ${vf} is not managed: ${info.unmanaged_reason}`);
    const current = this.internal.get(vf) ?? "init";
    const wanted = { status: current, run: "running", quiesce: "quiesced", freeze: "freezed" } as const;
    this.internal.set(vf, wanted[operation]);
    return wanted[operation];
  }

  async logVf(vf: PciAddress, operation: LoggingOperation, form: MapForm = "bitmap"): Promise<ManualLog> {
    this.vfInfo(vf);
    const mode = `pull-${form}`;
    return operation === "start-logging" ? { mode } : { mode, pages: 12, milliseconds: 3.25 };
  }

  onEvent(handler: (event: RegistryEvent) => void): Disposable {
    this.handlers.add(handler);
    return { [Symbol.dispose]: () => void this.handlers.delete(handler) };
  }

  private pf(pf: PciAddress): PfInfo {
    const info = this.pfs.get(pf);
    if (info === undefined) throw new VhostdError("pfNotFound", `PF ${pf} has not been added`, { fix: "add it" });
    return info;
  }

  private emit(event: RegistryEvent): void {
    for (const handler of this.handlers) handler(event);
  }
}

export function vfInfo(vf: PciAddress, pf: PciAddress | null, more: Partial<VfInfo> = {}): VfInfo {
  return {
    vf,
    probed: true,
    class: "net",
    pf,
    msix_num: 10,
    queue_num: 8,
    queue_size: 256,
    device_feature: (1n << 5n) | (1n << 28n) | (1n << 32n) | (1n << 55n),
    driver_feature: null,
    class_feature_names: { 5: "MAC" },
    config: { mtu: "1500", mac: "00:00:00:00:33:00" },
    vm_uuid: "",
    socket_file: `/tmp/vf-${vf}`,
    mode: "client",
    connected: false,
    configured: false,
    state: "idle",
    reason: null,
    mover: "vendor",
    managed: true,
    unmanaged_reason: null,
    unmanaged: false,
    host_notifier: false,
    frontend: "standard",
    interface: "vfio-user",
    iommu_group: null,
    numa_node: null,
    migration: null,
    ...more,
  };
}
