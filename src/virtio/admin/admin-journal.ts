import { VhostdError } from "../../base/errors.ts";
import { struct } from "../../base/layout.ts";

/**
 * What of a slot outlives its process. `awaited`: the device has its command; `lost`: so it does, and nobody waits for
 * it any more.
 */
export type JournalEntry =
  | { readonly kind: "free" }
  | {
      readonly kind: "awaited" | "lost";
      readonly vdevId: number;
      /** The command may change the VF whenever the device comes to it. */
      readonly alters: boolean;
    };

/** Where a driver stands: what it has made available, and what it has seen of the used ring. */
export interface JournalIndices {
  readonly available: number;
  readonly used: number;
}

const HEAD = struct("admin journal", 4, { available: [0, "u16"], used: [2, "u16"] });
const ENTRY = struct("admin journal entry", 4, { kind: [0, "u8"], alters: [1, "u8"], vdevId: [2, "u16"] });
const KINDS = ["free", "awaited", "lost"] as const;

/** Bytes of the journal of so many slots. */
export function journalSize(slots: number): number {
  return HEAD.size + slots * ENTRY.size;
}

/**
 * The driver's own notes on its admin queue, for the process that takes the queue up. They are written whole and by one
 * system call, so that a process that dies leaves the notes of before or those of after.
 */
export class AdminJournal {
  private readonly bytes: Uint8Array<ArrayBuffer>;

  constructor(private readonly slots: number) {
    this.bytes = new Uint8Array(journalSize(slots));
  }

  set(slot: number, entry: JournalEntry): void {
    const { vdevId, alters } = entry.kind === "free" ? { vdevId: 0, alters: false } : entry;
    const fields = { kind: KINDS.indexOf(entry.kind), alters: alters ? 1 : 0, vdevId };
    ENTRY.write(this.bytes, fields, HEAD.size + slot * ENTRY.size);
  }

  encode(indices: JournalIndices): Uint8Array<ArrayBuffer> {
    HEAD.write(this.bytes, indices);
    return this.bytes;
  }

  /** Goes on with the notes of another process, which the device's process may have changed. @throws VhostdError io */
  decode(bytes: Uint8Array): JournalIndices & { readonly entries: readonly JournalEntry[] } {
    this.bytes.set(bytes);
    const entries = Array.from({ length: this.slots }, (_, slot): JournalEntry => {
      const { kind, alters, vdevId } = ENTRY.read(bytes, HEAD.size + slot * ENTRY.size);
      const name = KINDS[kind];
      if (name === undefined) throw new VhostdError("io", `its journal says ${kind} of slot ${slot}; 0 to 2`);
      return name === "free" ? { kind: name } : { kind: name, vdevId, alters: alters !== 0 };
    });
    return { ...HEAD.read(bytes), entries };
  }
}
