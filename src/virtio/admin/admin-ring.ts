import { VhostdError } from "../../base/errors.ts";
import { struct } from "../../base/layout.ts";
import { DescriptorFlag } from "../split-ring.ts";
import { type AdminMemory, SLOT_DESCRIPTORS } from "./admin-memory.ts";

/** One command as its buffers. */
export interface AdminCommand {
  /** The id of the VF that it is about, 0 for the PF. */
  readonly vdevId: number;
  /** Device-readable, in descriptors of their own. `data` may be empty. */
  readonly header: Uint8Array;
  readonly data: Uint8Array;
  readonly payload?: Uint8Array;
  /** Bytes of the result. */
  readonly resultLength: number;
}

export interface AdminReply {
  /** The last byte of the command. */
  readonly status: number;
  /** As many bytes as were asked for; those that the device did not write are 0. */
  readonly result: Uint8Array;
}

/** struct virtq_desc (2.7.5) and virtq_used_elem (2.7.8). */
const DESCRIPTOR = struct("descriptor", 16, {
  address: [0, "addr"],
  length: [8, "u32"],
  flags: [12, "u16"],
  next: [14, "u16"],
});
const USED_ELEMENT = struct("used element", 8, { id: [0, "u32"], length: [4, "u32"] });
/** Both rings begin with `flags u16, idx u16`. */
const INDEX = 2;
const ENTRIES = 4;

/** What a device that writes no status is taken to have said: an unknown error, not to be tried again. */
const NO_STATUS = 0xff;

/**
 * The split ring of an admin queue (VIRTIO 1.2, 2.7), driver side. Each slot has its own descriptors, so the head of a
 * chain says which command it is, and nothing has to be allocated.
 */
export class AdminRing {
  private available: number;
  private used: number;

  /** Stands where the memory says that the driver stands; everything before counts as completed. */
  constructor(private readonly memory: AdminMemory) {
    this.available = memory.readU16(memory.ringPlaces.driver + INDEX);
    this.used = this.available;
  }

  /** Commands made available that the device has not given back, mod 2^16: those of an earlier process included. */
  outstanding(): number {
    return (this.available - this.usedIndex()) & 0xffff;
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
    memory.writeU16(driver + ENTRIES + 2 * (this.available % memory.ringSize), head);
    this.available = (this.available + 1) & 0xffff;
    memory.writeU16(driver + INDEX, this.available);
  }

  /**
   * The slots that the device has given back since it was asked last.
   * @param most slots that are in flight
   * @throws VhostdError io where that makes no sense, or the memory is gone
   */
  collect(most: number): number[] {
    let count = (this.usedIndex() - this.used) & 0xffff;
    // The two bytes are not read at once: what looks wrong is looked at again.
    if (count > most) count = (this.usedIndex() - this.used) & 0xffff;
    if (count > most) throw nonsense(`the used index moved by ${count} with ${most} commands in flight`);
    const { device } = this.memory.ringPlaces;
    const slots: number[] = [];
    for (let i = 0; i < count; i++) {
      const at = device + ENTRIES + USED_ELEMENT.size * (this.used % this.memory.ringSize);
      const { id } = USED_ELEMENT.read(this.memory.read(at, USED_ELEMENT.size));
      const slot = id / SLOT_DESCRIPTORS;
      if (!Number.isInteger(slot) || slot >= this.memory.slots)
        throw nonsense(`descriptor ${id} is no command's first`);
      slots.push(slot);
      this.used = (this.used + 1) & 0xffff;
    }
    return slots;
  }

  /** What the device wrote. How much it says to have written means nothing to us. @throws VhostdError io */
  reply(slot: number, resultLength: number): AdminReply {
    const { result, status } = this.memory.slot(slot);
    const [code = NO_STATUS] = this.memory.read(status, 1);
    return { status: code, result: this.memory.read(result, resultLength) };
  }

  private usedIndex(): number {
    return this.memory.readU16(this.memory.ringPlaces.device + INDEX);
  }
}

function nonsense(what: string): VhostdError {
  return new VhostdError("io", `the device broke the ring: ${what}`);
}
