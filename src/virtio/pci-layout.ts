import { VhostdError } from "../base/errors.ts";
import type { PciFunction } from "../pci/function.ts";
import {
  COMMON_CONFIG_LEAST,
  PCI_STATUS_CAPABILITIES,
  PciCapability,
  PciCommand,
  PciConfig,
  VIRTIO_CAP,
  VIRTIO_DEVICE_BASE,
  VIRTIO_NOTIFY_CAP,
  VIRTIO_VENDOR,
  VirtioCapType,
} from "./registers.ts";

/** A part of a base address register's space. Bytes. */
export type Place = { readonly bar: number; readonly offset: number; readonly size: number };

/** Where a modern virtio PCI device keeps its registers (VIRTIO 1.2, 4.1.4); plain data. */
export type PciLayout = {
  /** Virtio device id: 2 is a block device. */
  readonly virtioId: number;
  readonly common: Place;
  readonly notify: Place & { readonly multiplier: number };
  /** Device configuration space; null where the device has none. */
  readonly device: Place | null;
};

/** The conventional space has room for no more capabilities than this. */
const CAPABILITIES_MAX = (PciConfig.size - 0x40) / 4;
const MSIX_CONTROL = 2;
const MSIX_ENABLE = 0x8000;
const MSIX_FUNCTION_MASK = 0x4000;

/**
 * Reads a function's capability list, lets the function decode its registers and use MSI-X, and keeps it from memory:
 * whatever it was doing before, it masters the bus only once it was reset and its driver sets it up.
 * @throws VhostdError probeFailed, naming what is missing or makes no sense
 */
export async function probeLayout(fn: PciFunction): Promise<PciLayout> {
  const bytes = await fn.config.readBytes(0, PciConfig.size);
  const u16 = (at: number) => bytes[at]! | (bytes[at + 1]! << 8);
  const vendor = u16(PciConfig.vendor);
  const virtioId = u16(PciConfig.device) - VIRTIO_DEVICE_BASE;
  if (vendor !== VIRTIO_VENDOR || virtioId < 1 || virtioId > 0x3f) {
    const seen = `${vendor.toString(16)}:${u16(PciConfig.device).toString(16)}`;
    throw probeFailed(fn, `it is ${seen}, not a modern virtio device (1af4:1041 to 1af4:107f)`);
  }
  if ((u16(PciConfig.status) & PCI_STATUS_CAPABILITIES) === 0) throw probeFailed(fn, "it has no capability list");

  const found = new Map<number, Place & { readonly at: number; readonly length: number }>();
  const reserved: string[] = [];
  let msix: number | undefined;
  for (const at of capabilityOffsets(fn, bytes)) {
    if (bytes[at] === PciCapability.msix) msix = at;
    if (bytes[at] !== PciCapability.vendor || at + VIRTIO_CAP.size > bytes.length) continue;
    const { type, bar, offset, size, length } = VIRTIO_CAP.read(bytes, at);
    // A reserved BAR is to be ignored, and of several capabilities of a type the first is preferred (4.1.4).
    if (bar > 5) reserved.push(`type ${type} names BAR ${bar}`);
    else if (!found.has(type) && type !== VirtioCapType.pciAccess) found.set(type, { bar, offset, size, at, length });
  }
  if (msix === undefined) throw probeFailed(fn, "it has no MSI-X capability");

  const place = (type: number, name: string, least: number) => {
    const capability = found.get(type);
    if (capability === undefined) {
      const why = reserved.length === 0 ? "" : ` (${reserved.join(", ")})`;
      throw probeFailed(fn, `it has no ${name} capability${why}`);
    }
    const { bar, offset, size } = capability;
    const whole = fn.region(bar).size;
    if (size < least) throw probeFailed(fn, `its ${name} has ${size} bytes; at least ${least}`);
    if (offset + size > whole) {
      throw probeFailed(fn, `its ${name} ends at ${offset + size} of BAR ${bar}, which has ${whole} bytes`);
    }
    return { bar, offset, size };
  };
  const common = place(VirtioCapType.common, "common configuration", COMMON_CONFIG_LEAST);
  const notify = place(VirtioCapType.notify, "notification", 2);
  const device = found.has(VirtioCapType.device) ? place(VirtioCapType.device, "device configuration", 1) : null;
  const layout = { virtioId, common, device, notify: { ...notify, multiplier: multiplier(fn, bytes, found) } };

  const control = u16(msix + MSIX_CONTROL);
  await Promise.all([
    fn.config.write(PciConfig.command, 2, (u16(PciConfig.command) | PciCommand.memory) & ~PciCommand.busMaster),
    fn.config.write(msix + MSIX_CONTROL, 2, (control | MSIX_ENABLE) & ~MSIX_FUNCTION_MASK),
  ]);
  return layout;
}

/** Where the capabilities begin. @throws VhostdError probeFailed where the list goes round or leaves the space */
function capabilityOffsets(fn: PciFunction, bytes: Uint8Array): number[] {
  const offsets: number[] = [];
  // The two low bits are reserved (PCI Local Bus 3.0, 6.7).
  for (let at = bytes[PciConfig.capabilities]! & ~3; at !== 0; at = bytes[at + 1]! & ~3) {
    if (at < 0x40) throw probeFailed(fn, `its capability list leads to byte ${at}, into the header`);
    if (offsets.includes(at) || offsets.length >= CAPABILITIES_MAX) {
      throw probeFailed(fn, `its capability list comes back to byte ${at}`);
    }
    offsets.push(at);
  }
  return offsets;
}

/** notify_off_multiplier (4.1.4.4). */
function multiplier(
  fn: PciFunction,
  bytes: Uint8Array,
  found: ReadonlyMap<number, { readonly at: number; readonly length: number }>,
): number {
  const { at, length } = found.get(VirtioCapType.notify)!;
  if (length < VIRTIO_NOTIFY_CAP.size || at + VIRTIO_NOTIFY_CAP.size > bytes.length) {
    throw probeFailed(fn, `its notification capability has ${length} bytes; at least ${VIRTIO_NOTIFY_CAP.size}`);
  }
  const value = VIRTIO_NOTIFY_CAP.read(bytes, at).multiplier;
  if (value === 1 || (value & (value - 1)) !== 0) {
    throw probeFailed(fn, `its notification multiplier is ${value}; 0 or an even power of two`);
  }
  return value;
}

function probeFailed(fn: PciFunction, what: string): VhostdError {
  return new VhostdError("probeFailed", `${fn.address} cannot be used: ${what}`);
}
