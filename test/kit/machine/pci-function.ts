import { readdirSync, readFileSync, readlinkSync, writeFileSync } from "node:fs";
import { basename, join } from "node:path";
import type { FunctionDescription, FunctionKind } from "./description.ts";

const SYSFS_PCI = "/sys/bus/pci/devices";
const PCI_ADDRESS = /^[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]$/;

/** A PCI function in sysfs. */
export class PciAddress {
  constructor(readonly address: string) {}

  /** Number of its IOMMU group. */
  get group(): number {
    return Number(basename(readlinkSync(this.path("iommu_group"))));
  }

  /** PCI addresses of all that share its group, itself among them. */
  get groupMembers(): string[] {
    return readdirSync(this.path("iommu_group/devices")).sort();
  }

  /** The driver that it is bound to. */
  get driver(): string | undefined {
    return this.link("driver");
  }

  /** Names of its VFIO devices (vfio0) while vfio-pci is bound; below /dev/vfio/devices where the kernel has those. */
  get vfioDevices(): string[] {
    return readdirSync(this.path("")).includes("vfio-dev") ? readdirSync(this.path("vfio-dev")) : [];
  }

  /** Its VFs, by their number. */
  get vfs(): PciAddress[] {
    const links = readdirSync(this.path("")).filter((name) => /^virtfn\d+$/.test(name));
    const sorted = links.sort((a, b) => Number(a.slice(6)) - Number(b.slice(6)));
    return sorted.map((name) => new PciAddress(this.link(name)!));
  }

  /**
   * Gives it to a driver, vfio-pci unless said, whatever it was bound to.
   * @returns dispose gives it back to the driver that it had
   * @throws Error where the driver does not take it
   */
  bind(driver = "vfio-pci"): Disposable {
    const before = this.driver;
    this.bindTo(driver);
    return { [Symbol.dispose]: () => (before === undefined ? this.release() : this.bindTo(before)) };
  }

  /** Takes it from its driver. */
  release(): void {
    this.writeAttribute("driver_override", "\n");
    const { driver } = this;
    if (driver !== undefined) writeFileSync(`/sys/bus/pci/drivers/${driver}/unbind`, this.address);
  }

  attribute(name: string): string {
    return readFileSync(this.path(name), "utf8").trim();
  }

  /** @throws Error with the kernel's reason */
  writeAttribute(name: string, value: string): void {
    writeFileSync(this.path(name), value);
  }

  private bindTo(driver: string): void {
    if (this.driver === driver) return;
    this.release();
    this.writeAttribute("driver_override", driver);
    writeFileSync("/sys/bus/pci/drivers_probe", this.address);
    if (this.driver !== driver)
      throw new Error(`${driver} did not take ${this.address}: it is bound to ${this.driver}`);
  }

  private link(name: string): string | undefined {
    try {
      return basename(readlinkSync(this.path(name)));
    } catch {
      return undefined;
    }
  }

  private path(name: string): string {
    return join(SYSFS_PCI, this.address, name);
  }
}

/** A function that the machine was made with. */
export class MachineFunction extends PciAddress {
  readonly kind: FunctionKind;
  /** QEMU's name of it. */
  readonly id: string;

  constructor(
    readonly description: FunctionDescription,
    address: string,
  ) {
    super(address);
    this.kind = description.kind;
    this.id = description.id;
  }
}

/** The function behind its root port; undefined where it is not plugged. */
export function findFunction(description: FunctionDescription): MachineFunction | undefined {
  const { port, bridgeSlot = 0 } = description;
  const below = bridgeSlot === 0 ? port : join(port, children(port)[0] ?? "");
  const wanted = `:${bridgeSlot.toString(16).padStart(2, "0")}.0`;
  const address = children(below).find((name) => name.endsWith(wanted));
  return address === undefined ? undefined : new MachineFunction(description, address);
}

function children(path: string): string[] {
  return readdirSync(join(SYSFS_PCI, path)).filter((name) => PCI_ADDRESS.test(name));
}
