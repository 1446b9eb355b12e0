import { VhostdError } from "../../base/errors.ts";
import { DESCRIPTOR, DescriptorFlag, RING, USED_ELEMENT } from "../split-ring.ts";
import { AdminJournal, type JournalEntry, journalSize } from "./admin-journal.ts";
import { type AdminMemory, SLOT_DESCRIPTORS } from "./admin-memory.ts";

/** One command as its buffers. */
export interface AdminCommand {
  /** The id of the VF that it is about, 0 for the PF. */
  readonly vdevId: number;
  /** It may change that VF whenever the device comes to it. */
  readonly alters: boolean;
  /** Device-readable, in descriptors of their own. `data` may be empty. */
  readonly header: Uint8Array;
  readonly data: Uint8Array;
  readonly payload?: Uint8Array;
  /** Bytes of the result. */
  readonly resultLength: number;
  /** Done ahead of need: that it is not answered in time says nothing of the queue. */
  readonly ahead?: boolean;
}

export interface AdminReply {
  /** The last byte of the command. */
  readonly status: number;
  /** As many bytes as were asked for; those that the device did not write are 0. */
  readonly result: Uint8Array;
}

/** What a device that writes no status is taken to have said: an unknown error, not to be tried again. */
const NO_STATUS = 0xff;

/**
 * The split ring of an admin queue (VIRTIO 1.2, 2.7), driver side. Each slot has its own descriptors, so the head of a
 * chain says which command it is, and nothing has to be allocated. What is in flight is in the journal.
 */
export class AdminRing {
  private available = 0;
  private used = 0;
  /** Slots whose command the device has. */
  private readonly inFlight = new Set<number>();
  private readonly journal: AdminJournal;

  /** Stands at the beginning, as fresh memory does. */
  constructor(private readonly memory: AdminMemory) {
    this.journal = new AdminJournal(memory.slots + 1);
  }

  /**
   * Stands where another process left the ring, by its journal.
   * @returns the slots in flight
   * @throws VhostdError io where the journal and the ring contradict each other
   */
  takeUp(): ReadonlyMap<number, Exclude<JournalEntry, { kind: "free" }>> {
    const { memory } = this;
    const { driver, journal } = memory.ringPlaces;
    const bytes = memory.read(journal, journalSize(memory.slots + 1));
    const { available, used, entries } = this.journal.decode(bytes);
    const left = new Map(entries.entries().flatMap(([slot, entry]) => (entry.kind === "free" ? [] : [[slot, entry]])));
    const published = memory.readU16(driver + RING.index);
    if (published !== available) {
      // It died with its last command noted and not yet made available: the device has never seen that one.
      const slot = memory.readU16(driver + RING.entries + 2 * (published % memory.ringSize)) / SLOT_DESCRIPTORS;
      if (available !== ((published + 1) & 0xffff) || !left.delete(slot)) {
        throw contradiction(`available index ${published} in the ring, ${available} in the journal`);
      }
      this.journal.set(slot, { kind: "free" });
    }
    if (left.size !== ((published - used) & 0xffff)) {
      throw contradiction(`${left.size} commands in flight (available ${published}, used ${used})`);
    }
    this.available = published;
    this.used = used;
    for (const slot of left.keys()) this.inFlight.add(slot);
    return left;
  }

  /** Makes a command available. @throws VhostdError io where the memory is gone */
  post(slot: number, command: AdminCommand): void {
    const { memory } = this;
    const { header, data, payload = new Uint8Array(0), resultLength } = command;
    const places = memory.slot(slot);
    memory.write(places.header, header);
    memory.write(places.data, data);
    memory.write(places.payload, payload);
    // Neither the state of another VF nor the status of an earlier command may be taken for this one's.
    memory.write(places.result, new Uint8Array(resultLength));
    memory.write(places.status, Uint8Array.of(NO_STATUS));
    const chain = [
      { at: places.header, length: header.length, flags: 0 },
      { at: places.data, length: data.length, flags: 0 },
      { at: places.payload, length: payload.length, flags: 0 },
      { at: places.result, length: resultLength, flags: DescriptorFlag.write },
      { at: places.status, length: 1, flags: DescriptorFlag.write },
    ].filter(({ length }) => length > 0);
    const head = slot * SLOT_DESCRIPTORS;
    const table = new Uint8Array(chain.length * DESCRIPTOR.size);
    for (const [i, { at, length, flags }] of chain.entries()) {
      const last = i === chain.length - 1;
      const link = last ? { flags, next: 0 } : { flags: flags | DescriptorFlag.next, next: head + i + 1 };
      DESCRIPTOR.write(table, { address: memory.iova + at, length, ...link }, i * DESCRIPTOR.size);
    }
    memory.write(head * DESCRIPTOR.size, table);
    const { driver } = memory.ringPlaces;
    memory.writeU16(driver + RING.entries + 2 * (this.available % memory.ringSize), head);
    this.available = (this.available + 1) & 0xffff;
    this.inFlight.add(slot);
    this.note(slot, { kind: "awaited", vdevId: command.vdevId, alters: command.alters });
    memory.writeU16(driver + RING.index, this.available);
  }

  /** Nobody waits for this slot any more, in the next process neither. @throws VhostdError io */
  giveUp(slot: number, { vdevId, alters }: Pick<AdminCommand, "vdevId" | "alters">): void {
    this.note(slot, { kind: "lost", vdevId, alters });
  }

  /**
   * The slots that the device has given back since it was asked last.
   * @throws VhostdError io where that makes no sense, or the memory is gone
   */
  collect(): number[] {
    const most = this.inFlight.size;
    let count = (this.usedIndex() - this.used) & 0xffff;
    // The two bytes are not read at once: what looks wrong is looked at again.
    if (count > most) count = (this.usedIndex() - this.used) & 0xffff;
    if (count > most) throw nonsense(`the used index moved by ${count} with ${most} commands in flight`);
    const { device } = this.memory.ringPlaces;
    const slots: number[] = [];
    for (let i = 0; i < count; i++) {
      const at = device + RING.entries + USED_ELEMENT.size * (this.used % this.memory.ringSize);
      const { id } = USED_ELEMENT.read(this.memory.read(at, USED_ELEMENT.size));
      const slot = id / SLOT_DESCRIPTORS;
      if (!Number.isInteger(slot) || slot > this.memory.slots) throw nonsense(`descriptor ${id} is no command's first`);
      if (!this.inFlight.delete(slot)) throw nonsense(`command ${slot} came back twice`);
      this.journal.set(slot, { kind: "free" });
      slots.push(slot);
      this.used = (this.used + 1) & 0xffff;
    }
    if (count > 0) this.saveJournal();
    return slots;
  }

  /** What the device wrote. How much it says to have written means nothing to us. @throws VhostdError io */
  reply(slot: number, resultLength: number): AdminReply {
    const { result, status } = this.memory.slot(slot);
    const [code = NO_STATUS] = this.memory.read(status, 1);
    return { status: code, result: this.memory.read(result, resultLength) };
  }

  private note(slot: number, entry: JournalEntry): void {
    this.journal.set(slot, entry);
    this.saveJournal();
  }

  private saveJournal(): void {
    const { available, used, memory } = this;
    memory.write(memory.ringPlaces.journal, this.journal.encode({ available, used }));
  }

  private usedIndex(): number {
    return this.memory.readU16(this.memory.ringPlaces.device + RING.index);
  }
}

function nonsense(what: string): VhostdError {
  return new VhostdError("io", `the device broke the ring: ${what}`);
}

function contradiction(what: string): VhostdError {
  return new VhostdError("io", `its memory contradicts itself: ${what}`);
}
