import { join } from "node:path";
import { openFile, pread, pwrite } from "../../../src/native/sys.ts";
import {
  COMMON_CONFIG,
  PciCapability,
  PciCommand,
  PciConfig,
  VIRTIO_CAP,
  VIRTIO_NOTIFY_CAP,
  VirtioCapType,
} from "../../../src/virtio/registers.ts";

/** `pci_cfg_data` behind the capability (VIRTIO 1.2, 4.1.4.9). */
const DATA = VIRTIO_CAP.size;
/** What all registers of a function that is gone, or cannot be reached, read as. */
const ALL_ONES = 0xff;

/** Where some registers are. */
interface Place {
  readonly bar: number;
  readonly offset: number;
}

/**
 * A second look at a virtio function, which its driver has no part in: through the PCI configuration access capability
 * (VIRTIO 1.2, 4.1.4.9) and the kernel's file of its configuration space. Works whoever has the function open.
 */
export class VirtioWindow {
  private readonly path: string;
  private readonly access: number;
  private readonly common: Place;
  private readonly notify: Place & { readonly multiplier: number };

  /** @param address PCI address @throws Error where it is no modern virtio function */
  constructor(private readonly address: string) {
    this.path = join("/sys/bus/pci/devices", address, "config");
    const bytes = this.readConfig(0, PciConfig.size);
    const found = new Map<number, number>();
    for (let at = bytes[PciConfig.capabilities]!; at !== 0; at = bytes[at + 1]!) {
      if (bytes[at] !== PciCapability.vendor) continue;
      const { type } = VIRTIO_CAP.read(bytes, at);
      if (!found.has(type)) found.set(type, at);
    }
    const at = (type: number) => {
      const place = found.get(type);
      if (place === undefined) throw new Error(`${address} has no virtio capability of type ${type}`);
      return place;
    };
    this.access = at(VirtioCapType.pciAccess);
    this.common = VIRTIO_CAP.read(bytes, at(VirtioCapType.common));
    this.notify = VIRTIO_NOTIFY_CAP.read(bytes, at(VirtioCapType.notify));
  }

  /** The device status field; 0 after a reset. */
  get status(): number {
    this.point(this.common, COMMON_CONFIG.deviceStatus[0], 1);
    return this.readConfig(this.access + DATA, 1)[0]!;
  }

  /** Whether the function may read and write memory. */
  get busMaster(): boolean {
    return (this.readConfig(PciConfig.command, 1)[0]! & PciCommand.busMaster) !== 0;
  }

  /** Whether its configuration space can be reached at all. */
  get answers(): boolean {
    return this.readConfig(PciConfig.vendor, 1)[0] !== ALL_ONES;
  }

  /** Rings the doorbell of a queue, for devices whose queues have theirs in the order of their numbers. */
  ring(queue: number): void {
    this.point(this.notify, queue * this.notify.multiplier, 2);
    this.writeConfig(this.access + DATA, Uint8Array.of(queue & 0xff, queue >> 8));
  }

  private point({ bar, offset }: Place, register: number, width: number): void {
    const window = VIRTIO_CAP.encode({ bar, offset: offset + register, size: width });
    this.writeConfig(this.access + VIRTIO_CAP.fields.bar[0], window.subarray(VIRTIO_CAP.fields.bar[0], 5));
    this.writeConfig(this.access + VIRTIO_CAP.fields.offset[0], window.subarray(VIRTIO_CAP.fields.offset[0]));
  }

  private readConfig(offset: number, length: number): Uint8Array {
    using file = openFile(this.path, "read");
    const bytes = new Uint8Array(length);
    const read = pread(file.number, bytes, offset);
    if (read !== length) throw new Error(`read ${read} of ${length} bytes of ${this.address} at ${offset}`);
    return bytes;
  }

  private writeConfig(offset: number, bytes: Uint8Array): void {
    using file = openFile(this.path, "read-write");
    const written = pwrite(file.number, bytes, offset);
    if (written !== bytes.length) throw new Error(`wrote ${written} bytes of ${this.address} at ${offset}`);
  }
}
