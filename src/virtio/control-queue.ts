import Type, { type Static } from "typebox";
import type { Deadline } from "../base/deadline.ts";
import { VhostdError } from "../base/errors.ts";
import type { OwnedFd } from "../native/fd.ts";
import type { DmaDomain } from "../pci/dma-domain.ts";
import type { ControlCommand } from "../plugin.ts";
import type { QueueState } from "./device-state.ts";
import { checkMemory, claimMemory, OwnMemory } from "./own-memory.ts";
import type { QueueLimits } from "./pci-device.ts";
import { NO_VECTOR } from "./registers.ts";
import {
  DESCRIPTOR,
  DescriptorFlag,
  descSize,
  deviceSize,
  driverSize,
  isRingSize,
  RING,
  RING_ALIGNMENT,
  USED_ELEMENT,
} from "./split-ring.ts";

/** Entries of the ring: one command at a time, in two descriptors. */
const RING_SIZE = { min: 2, max: 64 } as const;
/** Bytes of a request, and of an answer, at most. */
const TRANSFER_MAX = 1024;
/** Milliseconds between two looks at the used ring. */
const POLL_INTERVAL = 1;
/** Where the parts are in the memory, with a ring of any size. Bytes. */
const PLACES = (() => {
  const driver = descSize(RING_SIZE.max);
  const { device: unit } = RING_ALIGNMENT;
  const device = Math.ceil((driver + driverSize(RING_SIZE.max)) / unit) * unit;
  const request = Math.ceil((device + deviceSize(RING_SIZE.max)) / TRANSFER_MAX) * TRANSFER_MAX;
  return { driver, device, request, answer: request + TRANSFER_MAX, size: request + 2 * TRANSFER_MAX } as const;
})();
const REQUEST = 0;
const ANSWER = 1;

const U16 = Type.Integer({ minimum: 0, maximum: 0xffff });

/** A control queue as plain data, which its memory belongs to. The indices are in the memory itself. */
export const ControlQueueSchema = Type.Object({
  index: U16,
  ringSize: Type.Integer({ minimum: RING_SIZE.min, maximum: RING_SIZE.max }),
  iova: Type.Integer({ minimum: 0, maximum: Number.MAX_SAFE_INTEGER }),
});
export type ControlQueueRecord = Static<typeof ControlQueueSchema>;

/** The function that a control queue belongs to. */
export interface ControlDevice {
  /** For errors. */
  readonly address: string;
  ringDoorbell(queue: number): Promise<void>;
}

/**
 * The control queue of a function, driver side: one command at a time, polled. No guest sees it, but a guest can have its
 * function write anywhere the function reaches: what is read here is trusted no more than a guest is.
 */
export class ControlQueue implements Disposable {
  /** Commands made available since `begin`, mod 2^16. */
  private available = 0;

  private constructor(
    private readonly device: ControlDevice,
    /** On the function. */
    readonly index: number,
    /** Entries. */
    private readonly ringSize: number,
    private readonly memory: OwnMemory,
  ) {}

  /**
   * A queue with memory of its own, which `owner` holds in the domain of the function until it releases it.
   * @param limits of the function's queues
   * @throws VhostdError probeFailed where the function has no such queue; iommuDomain where there is no room
   */
  static async open(
    device: ControlDevice,
    index: number,
    limits: readonly QueueLimits[],
    domain: DmaDomain,
    owner: string,
  ): Promise<ControlQueue> {
    const sizeMax = limits[index]?.sizeMax ?? 0;
    if (sizeMax < RING_SIZE.min) {
      throw new VhostdError(
        "probeFailed",
        `the control queue of ${device.address} is queue ${index} of ${limits.length} and has ${sizeMax} entries; ${RING_SIZE.min} are needed`,
      );
    }
    const memory = await claimMemory(domain, owner, PLACES.size);
    return new ControlQueue(device, index, Math.min(sizeMax, RING_SIZE.max), memory);
  }

  /** A queue as another process left it, mapped. Takes the fd where it does not throw. @throws VhostdError invalid */
  static revive(device: ControlDevice, { index, ringSize, iova }: ControlQueueRecord, file: OwnedFd): ControlQueue {
    if (!isRingSize(ringSize)) throw new VhostdError("invalid", `the stored control queue has ${ringSize} entries`);
    checkMemory(file, PLACES.size, "the control queue");
    const queue = new ControlQueue(device, index, ringSize, new OwnMemory(file, iova));
    queue.available = queue.memory.readU16(PLACES.driver + RING.index);
    return queue;
  }

  /** The device was reset: the ring is empty. @returns what the queue is set up with */
  begin(): QueueState {
    const { index, ringSize, memory } = this;
    memory.write(0, new Uint8Array(PLACES.size));
    this.available = 0;
    const { iova } = memory;
    const ring = { desc: iova, driver: iova + PLACES.driver, device: iova + PLACES.device };
    return { index, size: ringSize, vector: NO_VECTOR, ...ring, lastAvail: 0, lastUsed: 0 };
  }

  /**
   * Gives a command to the running device and waits for its answer. After one that was not answered in time the next one
   * waits for both.
   * @returns whether the device accepted it
   * @throws VhostdError invalid where the command is too long; timedOut; io where what the device writes makes no sense
   */
  async command(command: ControlCommand, deadline: Deadline): Promise<boolean> {
    const { name, request, answerSize } = command;
    const fits = (length: number) => Number.isInteger(length) && length > 0 && length <= TRANSFER_MAX;
    if (!fits(request.length) || !fits(answerSize)) {
      throw new VhostdError(
        "invalid",
        `the command ${name} has a request of ${request.length} bytes and an answer of ${answerSize}; 1 to ${TRANSFER_MAX}`,
      );
    }
    // An earlier process may have died between making a command available and saying so.
    if (this.left !== 0) await deadline.race(this.device.ringDoorbell(this.index));
    await this.idle(name, deadline);
    this.post(request, answerSize);
    await deadline.race(this.device.ringDoorbell(this.index));
    await this.idle(name, deadline);
    const { memory } = this;
    const element = PLACES.device + RING.entries + USED_ELEMENT.size * ((this.available - 1) & (this.ringSize - 1));
    const { id, length } = USED_ELEMENT.read(memory.read(element, USED_ELEMENT.size));
    if (id !== REQUEST) throw this.nonsense(name, `gave back descriptor ${id} instead of ${REQUEST}`);
    if (length < answerSize) throw this.nonsense(name, `wrote ${length} bytes of an answer of ${answerSize}`);
    return command.accepted(memory.read(PLACES.answer, answerSize));
  }

  snapshot(): { readonly data: ControlQueueRecord; readonly fd: number } {
    const { index, ringSize, memory } = this;
    return { data: { index, ringSize, iova: memory.iova }, fd: memory.file.number };
  }

  /** Lets go of everything of this process; what is mapped stays mapped. */
  [Symbol.dispose](): void {
    this.memory[Symbol.dispose]();
  }

  private post(request: Uint8Array, answerSize: number): void {
    const { memory } = this;
    memory.write(PLACES.request, request);
    memory.write(PLACES.answer, new Uint8Array(answerSize));
    const { iova } = memory;
    const table = [
      { address: iova + PLACES.request, length: request.length, flags: DescriptorFlag.next, next: ANSWER },
      { address: iova + PLACES.answer, length: answerSize, flags: DescriptorFlag.write, next: 0 },
    ];
    for (const [at, descriptor] of table.entries()) {
      memory.write(DESCRIPTOR.size * at, DESCRIPTOR.encode(descriptor));
    }
    const entry = PLACES.driver + RING.entries + 2 * (this.available & (this.ringSize - 1));
    memory.writeU16(entry, REQUEST);
    this.available = (this.available + 1) & 0xffff;
    memory.writeU16(PLACES.driver + RING.index, this.available);
  }

  /** The device has given back all that it was given. @throws VhostdError timedOut; io where it gave back more */
  private async idle(name: string, deadline: Deadline): Promise<void> {
    try {
      await deadline.poll(() => {
        // The two bytes are not read at once: what looks wrong is looked at again.
        if (this.left > 1 && this.left > 1) {
          const used = this.memory.readU16(PLACES.device + RING.index);
          throw this.nonsense(name, `has used index ${used} with ${this.available} commands made available`);
        }
        return this.left === 0 || undefined;
      }, POLL_INTERVAL);
    } catch (cause) {
      if (!(cause instanceof VhostdError && cause.code === "timedOut")) throw cause;
      const { address } = this.device;
      throw new VhostdError("timedOut", `${cause.message}: ${address} has not answered ${name} on its control queue`, {
        cause,
      });
    }
  }

  /** Commands that the device has, mod 2^16. */
  private get left(): number {
    return (this.available - this.memory.readU16(PLACES.device + RING.index)) & 0xffff;
  }

  private nonsense(name: string, what: string): VhostdError {
    return new VhostdError("io", `${this.device.address} broke its control queue: on ${name} it ${what}`);
  }
}
