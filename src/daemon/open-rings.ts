import Type, { type Static } from "typebox";
import { VhostdError } from "../base/errors.ts";
import { parseStored } from "../base/stored.ts";
import type { DeviceClass } from "../plugin.ts";
import type { DeviceState, QueueState } from "../virtio/device-state.ts";
import { availIndex, type RingMemory, usedIndex } from "../virtio/split-ring.ts";

const Word = Type.Integer({ minimum: 0, maximum: 0xffff });
const Address = Type.Integer({ minimum: 0 });
const OpenRing = Type.Object({
  index: Word,
  driver: Address,
  device: Address,
  /** Everything before this used index was given back in the order of the ring; null where that is not so. */
  from: Type.Union([Word, Type.Null()]),
});
const Schema = Type.Object({
  open: Type.Array(OpenRing),
  /** Rings that cannot go on, and why. */
  lost: Type.Array(Type.Object({ index: Word, reason: Type.String() })),
});
/** Plain data. */
export type OpenRingsRecord = Static<typeof Schema>;
type OpenRing = Static<typeof OpenRing>;

/** Of a device that no guest has used yet. */
export const NO_RINGS: OpenRingsRecord = { open: [], lost: [] };

/** Of a guest whose session has ended: nothing in it is needed any more. */
export const NO_MEMORY: RingMemory = {
  read() {
    throw new VhostdError("badAddress", "the guest's memory went with its session");
  },
};

/**
 * What a device still has to give back to its guest. When it is reset before it has, the indices in guest memory do not
 * say which requests those are, because a device may complete out of order: such a ring cannot go on. This is never
 * guessed; the guest's driver has to begin with a new ring. Receive queues are given back in order and go on at their used
 * index: they are not looked at.
 */
export class OpenRings {
  private open: OpenRing[] = [];
  /** Why a ring of the last front-end cannot go on, by queue. */
  private readonly lost = new Map<number, string>();

  constructor(private readonly deviceClass: Pick<DeviceClass, "receives">) {}

  /** @throws VhostdError invalid where the record of an earlier process is malformed */
  static revive(data: unknown, deviceClass: Pick<DeviceClass, "receives">): OpenRings {
    const record: OpenRingsRecord = parseStored(Schema, data, "the record of a VF's rings");
    const rings = new OpenRings(deviceClass);
    rings.open = record.open;
    for (const { index, reason } of record.lost) rings.lost.set(index, reason);
    return rings;
  }

  /** Why rings of the last guest cannot go on, or undefined. */
  get trouble(): string | undefined {
    const [first] = this.lost;
    return first && `queue ${first[0]} of the last guest cannot go on: ${first[1]}`;
  }

  /**
   * The device is about to run on these rings.
   * @throws VhostdError notSupported where one is to go on and cannot
   */
  begin({ queues }: DeviceState): void {
    for (const { index, lastAvail, lastUsed } of queues) {
      const reason = this.lost.get(index);
      if (reason === undefined || (lastAvail === 0 && lastUsed === 0)) continue;
      throw new VhostdError("notSupported", `queue ${index} is to resume at index ${lastUsed}, but ${reason}`, {
        fix: "restart the guest's driver (reboot the guest)",
        data: { queue: index, lastUsed },
      });
    }
    for (const { index } of queues) this.lost.delete(index);
    this.open = this.settling(queues).map(openRing);
  }

  /** The device has stopped in this state. */
  stopped({ queues }: DeviceState): void {
    const open = this.settling(queues).filter(({ lastAvail, lastUsed }) => lastAvail !== lastUsed);
    this.open = open.map(openRing);
  }

  /** A reset takes nothing from the guest. */
  get isClean(): boolean {
    return this.open.length === 0;
  }

  /** The guest's driver has given its rings up. */
  givenUp(): void {
    this.open = [];
    this.lost.clear();
  }

  /** The device was reset and has left guest memory alone since. */
  reset(memory: RingMemory): void {
    for (const ring of this.open.splice(0)) {
      const reason = whyLost(ring, memory);
      if (reason !== undefined) this.lost.set(ring.index, reason);
    }
  }

  snapshot(): OpenRingsRecord {
    return { open: this.open, lost: [...this.lost].map(([index, reason]) => ({ index, reason })) };
  }

  private settling(queues: DeviceState["queues"]): readonly QueueState[] {
    return queues.filter(({ index }) => this.deviceClass.receives?.(index) !== true);
  }
}

function openRing({ index, driver, device, lastUsed, inFlight = [] }: QueueState): OpenRing {
  return { index, driver, device, from: inFlight.length === 0 ? lastUsed : null };
}

function whyLost(ring: OpenRing, memory: RingMemory): string | undefined {
  try {
    const [used, available] = [usedIndex(memory, ring), availIndex(memory, ring)];
    // All came back, or none: then those that are open are the next ones of the ring.
    if (used === available || used === ring.from) return undefined;
    return `the function was reset when it was at available ${available} and used ${used}: which requests were open is not known`;
  } catch (error) {
    if (!(error instanceof VhostdError)) throw error;
    return `the function was reset, and what was open is not known: ${error.message}`;
  }
}
