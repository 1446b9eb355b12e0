import { Deadline } from "../../../src/base/deadline.ts";
import { asError } from "../../../src/base/errors.ts";
import { struct } from "../../../src/base/layout.ts";
import { DescriptorFlag } from "../../../src/virtio/split-ring.ts";
import type { DriverQueue } from "../driver-queue.ts";
import type { Completed, RawBuffer } from "../driver-ring.ts";
import type { DriverMemory } from "../guest-memory-file.ts";
import { FRAME_MAX } from "./frames.ts";

/** Before each frame in both directions (VIRTIO 1.2, 5.1.6). */
export const NET_HEADER = struct("net header", 12, {
  flags: [0, "u8"],
  gsoType: [1, "u8"],
  headerLength: [2, "u16"],
  gsoSize: [4, "u16"],
  checksumStart: [6, "u16"],
  checksumOffset: [8, "u16"],
  buffers: [10, "u16"],
});

/** Milliseconds. */
const SETTLE_TIMEOUT = 1_000;
/** Where nothing was written to a receive buffer, it still has this in each byte. */
const POISON = 0xa5;
/** Bytes of a buffer where a frame may take several (MRG_RXBUF): a large frame takes four. */
const MERGEABLE_BUFFER = 400;

/** Of a receive buffer: every other one has its header apart. */
const DESCRIPTORS = 1.5;

/** A receive buffer: one descriptor, or the header in one of its own. */
interface ReceiveBuffer {
  readonly address: number;
  /** Bytes. */
  readonly size: number;
  readonly descriptors: readonly RawBuffer[];
}

/** What a frame that takes several buffers has so far. */
interface Gathering {
  readonly parts: Uint8Array[];
  missing: number;
}

export interface NetPairOptions {
  /** MRG_RXBUF is negotiated. */
  readonly mergeable: boolean;
  /** Receive buffers that the device has at all times; as many as the ring has room for unless said. */
  readonly buffers?: number;
  /** A frame has arrived, without its header. */
  onFrame(frame: Uint8Array): void;
  /** The device did something that it must not; nothing is received any more. */
  onFailure(error: Error): void;
}

/** The driver side of a receive and a transmit queue (VIRTIO 1.2, 5.1.6): always buffers there, every byte of them watched. */
export class NetPair {
  private readonly posted = new Set<ReceiveBuffer>();
  private readonly pool: ReceiveBuffer[];
  private gathering: Gathering | undefined;
  /** Frames that were received. */
  received = 0;
  /** Frames that were handed to the device. */
  sent = 0;
  /** Frames that the device gave back. */
  transmitted = 0;

  constructor(
    private readonly memory: DriverMemory,
    readonly receive: DriverQueue,
    readonly transmit: DriverQueue,
    private readonly options: NetPairOptions,
  ) {
    const count = options.buffers ?? Math.floor(receive.ring.size / DESCRIPTORS);
    this.pool = Array.from({ length: count }, (_, number) => this.newBuffer(number));
    for (const buffer of this.pool) this.post(buffer);
  }

  /** Frames that the device has and has not given back. */
  get sending(): number {
    return this.sent - this.transmitted;
  }

  /**
   * Hands a frame to the device; resolves when it gives it back.
   * @throws RangeError where the ring is full
   */
  async send(frame: Uint8Array, header: Partial<Parameters<typeof NET_HEADER.encode>[0]> = {}): Promise<void> {
    const head = NET_HEADER.encode(header);
    // The framing is the driver's to choose (2.7.4): together, or apart.
    const apart = this.sent % 2 === 0;
    const given = this.transmit.request(apart ? [head, frame] : [Buffer.concat([head, frame])], []);
    this.sent++;
    const { length } = await given;
    this.transmitted++;
    if (length !== 0) throw new Error(`the device says that it wrote ${length} bytes to a frame that it sent`);
  }

  /**
   * The buffers that wait for frames are as they were posted: nothing was written to any that did not come back.
   * @throws Error
   */
  async checkUntouched(): Promise<void> {
    // A frame may be on its way still.
    const deadline = Deadline.after(SETTLE_TIMEOUT, "the last frame");
    const wrong = await deadline.poll(() => {
      this.receive.collect();
      const wrong = this.wrongBuffers();
      return wrong === undefined || deadline.expired ? { wrong } : undefined;
    }, 1);
    if (wrong.wrong !== undefined) throw new Error(wrong.wrong);
  }

  private wrongBuffers(): string | undefined {
    for (const buffer of this.posted) {
      const at = firstTouched(this.memory.read(buffer.address, buffer.size));
      if (at >= 0) return `the device wrote at byte ${at} of a receive buffer that it did not give back`;
    }
    if (this.gathering !== undefined) return `a frame lacks ${this.gathering.missing} buffers`;
    if (this.posted.size === this.pool.length) return undefined;
    return `the device has ${this.posted.size} of ${this.pool.length} receive buffers`;
  }

  private newBuffer(number: number): ReceiveBuffer {
    const size = this.options.mergeable ? MERGEABLE_BUFFER : NET_HEADER.size + FRAME_MAX;
    const address = this.receive.ring.arena.take(size);
    const flags = DescriptorFlag.write;
    const split = number % 2 === 0 ? size : NET_HEADER.size;
    const descriptors = [{ address, length: split, flags }];
    if (split < size) descriptors.push({ address: address + split, length: size - split, flags });
    return { address, size, descriptors };
  }

  private post(buffer: ReceiveBuffer): void {
    this.memory.write(buffer.address, new Uint8Array(buffer.size).fill(POISON));
    this.posted.add(buffer);
    this.receive.requestRaw(buffer.descriptors).then(
      (completed) => this.take(buffer, completed),
      (error: unknown) => this.options.onFailure(asError(error)),
    );
  }

  /** Resolved promises go on in the order in which the device gave the buffers back. */
  private take(buffer: ReceiveBuffer, { length }: Completed): void {
    const [oldest] = this.posted;
    this.posted.delete(buffer);
    try {
      if (buffer !== oldest) throw new Error("a receive buffer came back before one that was there earlier");
      const bytes = this.memory.read(buffer.address, buffer.size);
      if (length > buffer.size) throw new Error(`${length} bytes in a receive buffer of ${buffer.size}`);
      const beyond = firstTouched(bytes.subarray(length));
      if (beyond >= 0) throw new Error(`the device wrote at byte ${length + beyond}, and says that it wrote ${length}`);
      this.gather(bytes.slice(0, length));
      this.post(buffer);
    } catch (error) {
      this.options.onFailure(asError(error));
    }
  }

  private gather(part: Uint8Array): void {
    if (this.gathering === undefined) {
      if (part.length <= NET_HEADER.size) throw new Error(`a frame of ${part.length} bytes with its header`);
      const { buffers, gsoType } = NET_HEADER.read(part);
      if (gsoType !== 0) throw new Error(`GSO type ${gsoType}, which was not negotiated`);
      if (buffers === 0 || (buffers > 1 && !this.options.mergeable)) throw new Error(`a frame in ${buffers} buffers`);
      this.gathering = { parts: [part.subarray(NET_HEADER.size)], missing: buffers - 1 };
    } else {
      this.gathering.parts.push(part);
      this.gathering.missing--;
    }
    const { parts, missing } = this.gathering;
    if (missing > 0) return;
    this.gathering = undefined;
    this.received++;
    this.options.onFrame(Buffer.concat(parts));
  }
}

function firstTouched(bytes: Uint8Array): number {
  return bytes.findIndex((byte) => byte !== POISON);
}
