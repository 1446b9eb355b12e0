/** Where things are in the base address registers of a soft function. Bytes. */

/** Virtio registers: BAR 4, 64 bits wide (4 and 5). */
export const VIRTIO_BAR = 4;
/** MSI-X table and pending bits: BAR 1. */
export const MSIX_BAR = 1;

const PAGE = 0x1000;
export const VirtioBlock = {
  common: { offset: 0x0000, size: 64 },
  isr: { offset: 0x1000, size: 4 },
  device: { offset: 0x2000, size: PAGE },
  notify: { offset: 0x3000 },
} as const;

/** Each queue's doorbell has a page of its own: letting a guest have one gives it no other. */
export const NOTIFY_MULTIPLIER = PAGE;

const MSIX_ENTRY = 16;

export interface FunctionLayout {
  readonly vectors: number;
  readonly queues: number;
  /** Device configuration space. */
  readonly deviceSize: number;
  readonly notifySize: number;
  readonly pendingBits: number;
  readonly virtioBarSize: number;
  readonly msixBarSize: number;
}

/** @param configLength bytes of device configuration space */
export function functionLayout(queues: number, vectors: number, configLength: number): FunctionLayout {
  // A capability may not be empty: a function without queues still shows one page.
  const notifySize = NOTIFY_MULTIPLIER * Math.max(1, queues);
  const pendingBits = pageAlign(MSIX_ENTRY * vectors);
  return {
    queues,
    vectors,
    deviceSize: Math.max(4, Math.ceil(configLength / 4) * 4),
    notifySize,
    pendingBits,
    virtioBarSize: powerOfTwo(VirtioBlock.notify.offset + notifySize),
    msixBarSize: powerOfTwo(pendingBits + pageAlign(8 * Math.ceil(vectors / 64))),
  };
}

function pageAlign(size: number): number {
  return Math.ceil(size / PAGE) * PAGE;
}

function powerOfTwo(size: number): number {
  return 2 ** Math.ceil(Math.log2(size));
}
