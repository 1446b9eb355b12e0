import { struct } from "../../base/layout.ts";

/** Status, and the head of the list of capabilities, in configuration space (PCI Local Bus 3.0, 6.2). */
const STATUS = 0x06;
const STATUS_CAPABILITIES = 0x10;
const CAPABILITIES = 0x34;
/** Where capabilities may begin. */
const FIRST = 0x40;

/** MSI-X capability (PCI Local Bus 3.0, 6.8.2). */
const MSIX_ID = 0x11;
const MSIX_CAP = struct("MSI-X capability", 12, {
  id: [0, "u8"],
  next: [1, "u8"],
  control: [2, "u16"],
  table: [4, "u32"],
  pending: [8, "u32"],
});
const CONTROL_LAST_VECTOR = 0x7ff;
/** Of `table` and `pending`: a BAR, and an offset in it. */
const BAR_MASK = 7;
const TABLE_ENTRY = 16;
/** Bits of pending interrupts come in words. */
const PENDING_WORD = 64;

/** Bytes of a BAR; plain data. */
export type BarRange = { readonly bar: number; readonly offset: number; readonly size: number };

/**
 * Where a function has its MSI-X table and its bits of pending interrupts; none where it has no MSI-X.
 * @param config conventional configuration space, 256 bytes
 */
export function msixRanges(config: Uint8Array): BarRange[] {
  if ((config[STATUS]! & STATUS_CAPABILITIES) === 0) return [];
  // Each begins at a multiple of 4; a list that goes round has come back by then.
  let at = config[CAPABILITIES]! & ~3;
  for (let left = config.length / 4; left > 0 && at >= FIRST && at + MSIX_CAP.size <= config.length; left--) {
    const { id, next, control, table, pending } = MSIX_CAP.read(config, at);
    if (id === MSIX_ID) {
      const vectors = (control & CONTROL_LAST_VECTOR) + 1;
      return [
        { ...placeOf(table), size: vectors * TABLE_ENTRY },
        { ...placeOf(pending), size: Math.ceil(vectors / PENDING_WORD) * (PENDING_WORD / 8) },
      ];
    }
    at = next & ~3;
  }
  return [];
}

function placeOf(register: number): { readonly bar: number; readonly offset: number } {
  return { bar: register & BAR_MASK, offset: (register & ~BAR_MASK) >>> 0 };
}
