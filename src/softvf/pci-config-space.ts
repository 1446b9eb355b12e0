import { struct } from "../base/layout.ts";
import {
  PCI_STATUS_CAPABILITIES,
  PciCapability,
  PciCommand,
  PciConfig,
  VIRTIO_CAP,
  VIRTIO_NOTIFY_CAP,
  VirtioCapType,
} from "../virtio/registers.ts";
import { type FunctionLayout, MSIX_BAR, NOTIFY_MULTIPLIER, VIRTIO_BAR, VirtioBlock } from "./layout.ts";

/** What a function says of itself (PCI 3.0, 6.2). */
export interface PciIdentity {
  readonly vendor: number;
  readonly device: number;
  readonly subsystemVendor: number;
  readonly subsystemDevice: number;
  readonly revision: number;
  /** 24 bits. */
  readonly class: number;
}

/** Conventional and extended space. Bytes. */
export const CONFIG_SPACE_SIZE = 4096;

const Header = { revision: 0x08, class: 0x09, bar: 0x10, subsystemVendor: 0x2c, subsystemDevice: 0x2e } as const;
const BAR_64BIT_PREFETCHABLE = 0xc;

/** PCI Express capability of an endpoint (PCIe 4.0, 7.5.3). */
const Express = { id: 0x10, size: 0x3c, capabilities: 2, deviceCapabilities: 4, deviceControl: 8 } as const;
const EXPRESS_ENDPOINT_V2 = 0x0002;
const CAN_RESET_FUNCTION = 1 << 28;
const ROLE_BASED_ERRORS = 1 << 15;
const INITIATE_FUNCTION_RESET = 0x8000;
/** Error reporting, relaxed ordering, payload sizes, no-snoop; without the reset bit, which reads as 0. */
const DEVICE_CONTROL_MASK = 0x7fff;

const MSIX_SIZE = 12;
const MSIX_CONTROL_MASK = 0xc000;

/** Where a driver without access to the address registers reaches into them (VIRTIO 1.2, 4.1.4.9). */
const WINDOW_CAP = struct("virtio_pci_cfg_cap", 20, { ...VIRTIO_CAP.fields, data: [16, "u32"] });

/** What a write means beyond the bytes, in the order to be done. One write may mean several. */
export type ConfigEffect = "functionReset" | "busMaster" | "windowWrite";

/** What the window shows now; `length` may be anything that a driver wrote. */
export interface Window {
  readonly bar: number;
  readonly offset: number;
  readonly length: number;
  readonly data: number;
}

/** The PCI configuration space of a soft function: contents and which bits a driver may change. */
export class PciConfigSpace {
  private readonly bytes = new Uint8Array(CONFIG_SPACE_SIZE);
  private readonly writable = new Uint8Array(CONFIG_SPACE_SIZE);
  private readonly view = new DataView(this.bytes.buffer);
  private readonly initial: Uint8Array;
  private readonly deviceControl: number;
  private readonly windowCap: number;

  constructor(identity: PciIdentity, layout: FunctionLayout) {
    const { view } = this;
    view.setUint16(PciConfig.vendor, identity.vendor, true);
    view.setUint16(PciConfig.device, identity.device, true);
    view.setUint16(PciConfig.status, PCI_STATUS_CAPABILITIES, true);
    view.setUint8(Header.revision, identity.revision);
    view.setUint8(Header.class, identity.class & 0xff);
    view.setUint16(Header.class + 1, identity.class >> 8, true);
    view.setUint16(Header.subsystemVendor, identity.subsystemVendor, true);
    view.setUint16(Header.subsystemDevice, identity.subsystemDevice, true);
    this.allow16(PciConfig.command, PciCommand.memory | PciCommand.busMaster | PciCommand.intxDisable);

    this.allow32(Header.bar + 4 * MSIX_BAR, -layout.msixBarSize);
    view.setUint32(Header.bar + 4 * VIRTIO_BAR, BAR_64BIT_PREFETCHABLE, true);
    this.allow32(Header.bar + 4 * VIRTIO_BAR, -layout.virtioBarSize);
    this.allow32(Header.bar + 4 * (VIRTIO_BAR + 1), -1);

    const places = this.addCapabilities(layout);
    this.deviceControl = places.express + Express.deviceControl;
    this.windowCap = places.window;
    this.initial = this.bytes.slice();
  }

  get busMaster(): boolean {
    return (this.view.getUint16(PciConfig.command, true) & PciCommand.busMaster) !== 0;
  }

  read(offset: number, length: number): Uint8Array {
    return this.bytes.slice(offset, offset + length);
  }

  /** Bits that cannot be written keep their value. */
  write(offset: number, data: Uint8Array): readonly ConfigEffect[] {
    const wasMaster = this.busMaster;
    for (const [index, value] of data.entries()) {
      const at = offset + index;
      const mask = this.writable[at]!;
      this.bytes[at] = (this.bytes[at]! & ~mask) | (value & mask);
    }
    const high = data[this.deviceControl + 1 - offset] ?? 0;
    const effects: ConfigEffect[] = [];
    if ((high & (INITIATE_FUNCTION_RESET >> 8)) !== 0) effects.push("functionReset");
    if (this.busMaster !== wasMaster) effects.push("busMaster");
    if (this.touchesWindow(offset, data.length)) effects.push("windowWrite");
    return effects;
  }

  get window(): Window {
    const { bar, offset, size, data } = WINDOW_CAP.read(this.bytes, this.windowCap);
    return { bar, offset, length: size, data };
  }

  /** The access reaches through the window. */
  touchesWindow(offset: number, length: number): boolean {
    const at = this.windowCap + WINDOW_CAP.fields.data[0];
    return offset < at + 4 && offset + length > at;
  }

  /** What is seen through the window. */
  showInWindow(data: Uint8Array): void {
    this.bytes.set(data, this.windowCap + WINDOW_CAP.fields.data[0]);
  }

  /** As it was when the function was made. */
  reset(): void {
    this.bytes.set(this.initial);
  }

  /** @returns where two of them are */
  private addCapabilities(layout: FunctionLayout): { readonly express: number; readonly window: number } {
    const { view } = this;
    let at = 0x40;
    let link: number = PciConfig.capabilities;
    const place = (id: number, size: number): number => {
      const here = at;
      view.setUint8(link, here);
      view.setUint8(here, id);
      link = here + 1;
      at = Math.ceil((here + size) / 4) * 4;
      return here;
    };

    const express = place(Express.id, Express.size);
    view.setUint16(express + Express.capabilities, EXPRESS_ENDPOINT_V2, true);
    view.setUint32(express + Express.deviceCapabilities, CAN_RESET_FUNCTION | ROLE_BASED_ERRORS, true);
    this.allow16(express + Express.deviceControl, DEVICE_CONTROL_MASK);

    const msix = place(PciCapability.msix, MSIX_SIZE);
    view.setUint16(msix + 2, layout.vectors - 1, true);
    this.allow16(msix + 2, MSIX_CONTROL_MASK);
    view.setUint32(msix + 4, MSIX_BAR, true);
    view.setUint32(msix + 8, layout.pendingBits | MSIX_BAR, true);

    const { common, isr, device, notify } = VirtioBlock;
    const blocks = [
      { type: VirtioCapType.common, ...common },
      { type: VirtioCapType.isr, ...isr },
      { type: VirtioCapType.device, offset: device.offset, size: layout.deviceSize },
    ];
    for (const { type, offset, size } of blocks) {
      const here = place(PciCapability.vendor, VIRTIO_CAP.size);
      VIRTIO_CAP.write(
        this.bytes,
        { id: PciCapability.vendor, length: VIRTIO_CAP.size, type, bar: VIRTIO_BAR, offset, size },
        here,
      );
    }
    const here = place(PciCapability.vendor, VIRTIO_NOTIFY_CAP.size);
    VIRTIO_NOTIFY_CAP.write(
      this.bytes,
      {
        id: PciCapability.vendor,
        length: VIRTIO_NOTIFY_CAP.size,
        type: VirtioCapType.notify,
        bar: VIRTIO_BAR,
        offset: notify.offset,
        size: layout.notifySize,
        multiplier: NOTIFY_MULTIPLIER,
      },
      here,
    );

    const window = place(PciCapability.vendor, WINDOW_CAP.size);
    const type = VirtioCapType.pciAccess;
    WINDOW_CAP.write(this.bytes, { id: PciCapability.vendor, length: WINDOW_CAP.size, type, bar: VIRTIO_BAR }, window);
    this.writable[window + VIRTIO_CAP.fields.bar[0]] = 0xff;
    for (const field of ["offset", "size", "data"] as const) this.allow32(window + WINDOW_CAP.fields[field][0], -1);
    return { express, window };
  }

  private allow16(offset: number, mask: number): void {
    new DataView(this.writable.buffer).setUint16(offset, mask, true);
  }

  private allow32(offset: number, mask: number): void {
    new DataView(this.writable.buffer).setUint32(offset, mask >>> 0, true);
  }
}
