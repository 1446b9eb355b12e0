import { Deadline } from "../../../src/base/deadline.ts";
import { DescriptorFlag } from "../../../src/virtio/split-ring.ts";
import { PreparedQueue, type Returned } from "../prepared-queue.ts";
import { encodeFrame, type Mac, readFrame, sizeOf } from "./frames.ts";
import type { NetFrontend } from "./net-frontend.ts";
import { NET_HEADER } from "./net-pair.ts";

const RING = 256;
/** Bytes of guest memory for each queue. */
const SPACE = 1 << 20;
/** Bytes of a buffer, header included. */
const BUFFER = 2048;
/** Frames under way at most, and frames that are worth a kick. */
const WINDOW = 192;
const BATCH = 32;

/** A buffer and the chain that it is. */
interface Slot {
  readonly address: number;
  readonly head: number;
}

/**
 * One end of a network, for very many frames: all of its receive buffers are always there, and each frame that comes is
 * compared. Its front-end has one pair, neither MRG_RXBUF nor what PLAIN_RINGS hides.
 */
export class FrameEnd implements Disposable {
  private readonly receive: PreparedQueue;
  private readonly transmit: PreparedQueue;
  private readonly filled = new Map<number, Slot>();
  private readonly free: Slot[] = [];
  private readonly sending = new Map<number, Slot>();
  private readonly expected = new Map<number, number>();
  /** Frames that came from somebody else. */
  strange = 0;
  /** Called when frames have come. */
  onFrames: () => void = () => {};

  private constructor(
    private readonly frontend: NetFrontend,
    readonly mac: Mac,
  ) {
    const { memory } = frontend;
    const base = memory.regions.at(-1)!.file.gpa;
    this.receive = new PreparedQueue(0, memory, base, RING, (returned) => this.take(returned));
    this.transmit = new PreparedQueue(1, memory, base + SPACE, RING, (returned) => this.sent(returned));
    for (const slot of slots(this.receive, DescriptorFlag.write)) this.filled.set(slot.head, slot);
    this.free.push(...slots(this.transmit, 0));
  }

  /** Starts the queues of a front-end that has memory, in its last region. */
  static async start(frontend: NetFrontend, mac: Mac): Promise<FrameEnd> {
    const end = new FrameEnd(frontend, mac);
    await frontend.startRings([end.receive, end.transmit]);
    end.receive.publish([...end.filled.keys()]);
    return end;
  }

  /** Frames that the device has and has not given back. */
  get underWay(): number {
    return this.sending.size;
  }

  /** Frames that can be handed to the device now. */
  get room(): number {
    return this.free.length;
  }

  get failure(): Error | undefined {
    return this.receive.failure ?? this.transmit.failure;
  }

  /** Frames of a stream that came, each one right and in its order. */
  receivedOf(stream: number): number {
    return this.expected.get(stream) ?? 0;
  }

  /** Hands frames of a stream to the device. @param from the first one's number */
  send(to: FrameEnd, stream: number, from: number, count: number): void {
    const heads: number[] = [];
    for (let sequence = from; sequence < from + count; sequence++) {
      const slot = this.free.pop();
      if (slot === undefined) throw new RangeError("more frames than there is room for");
      const frame = encodeFrame({ to: to.mac, from: this.mac, stream, sequence, size: sizeOf(sequence) });
      this.frontend.memory.write(slot.address, Buffer.concat([NET_HEADER.encode({}), frame]));
      // The chain is as long as its frame.
      this.transmit.resize(slot.head, NET_HEADER.size + frame.length);
      this.sending.set(slot.head, slot);
      heads.push(slot.head);
    }
    this.transmit.publish(heads);
  }

  [Symbol.dispose](): void {
    this.receive[Symbol.dispose]();
    this.transmit[Symbol.dispose]();
  }

  private sent(returned: readonly Returned[]): void {
    for (const { head, length } of returned) {
      const slot = this.sending.get(head);
      if (slot === undefined || !this.sending.delete(head))
        throw new Error(`frame ${head} came back, and was not sent`);
      if (length !== 0) throw new Error(`the device says that it wrote ${length} bytes to a frame that it sent`);
      this.free.push(slot);
    }
    this.onFrames();
  }

  private take(returned: readonly Returned[]): void {
    for (const { head, length } of returned) {
      const slot = this.filled.get(head);
      if (slot === undefined) throw new Error(`the device gave back ${head}, which is no receive buffer`);
      if (length > BUFFER) throw new Error(`${length} bytes in a receive buffer of ${BUFFER}`);
      this.check(this.frontend.memory.read(slot.address, length).subarray(NET_HEADER.size));
    }
    this.receive.publish(returned.map(({ head }) => head));
    this.onFrames();
  }

  private check(bytes: Uint8Array): void {
    const frame = readFrame(bytes);
    if (frame === undefined) {
      this.strange++;
      return;
    }
    const { stream, sequence } = frame;
    const expected = this.receivedOf(stream);
    if (sequence !== expected)
      throw new Error(`frame ${sequence} of stream ${stream} came in the place of ${expected}`);
    if (frame.size !== sizeOf(sequence) || Buffer.compare(bytes, encodeFrame(frame)) !== 0) {
      throw new Error(`frame ${sequence} of stream ${stream} came different (${bytes.length} bytes)`);
    }
    this.expected.set(stream, sequence + 1);
  }
}

function slots(queue: PreparedQueue, flags: number): Slot[] {
  return Array.from({ length: RING }, (_, number) => {
    const address = queue.end + number * BUFFER;
    return { address, head: queue.chain([{ address, length: BUFFER, flags }]) };
  });
}

/**
 * Sends frames in both directions at once, never more than the other end has buffers for, and waits for all of them.
 * @param count in each direction
 * @param timeout milliseconds
 * @throws what went wrong at either end: a frame that is lost, changed or out of order; VhostdError timedOut
 */
export async function exchangeFrames(a: FrameEnd, b: FrameEnd, count: number, timeout: number): Promise<void> {
  const directions = [new Direction(a, b, count), new Direction(b, a, count)];
  const pump = () => {
    for (const direction of directions) direction.pump();
  };
  a.onFrames = b.onFrames = pump;
  pump();
  await Deadline.after(timeout, `${count} frames in each direction`).poll(() => {
    const failure = a.failure ?? b.failure;
    if (failure !== undefined) throw failure;
    return directions.every(({ done }) => done) || undefined;
  }, 5);
}

let streams = 0;

/** Frames from one end to another. */
class Direction {
  private readonly stream = ++streams;
  private sent = 0;

  constructor(
    private readonly from: FrameEnd,
    private readonly to: FrameEnd,
    private readonly count: number,
  ) {}

  get done(): boolean {
    return this.to.receivedOf(this.stream) === this.count && this.from.underWay === 0;
  }

  pump(): void {
    const window = WINDOW - (this.sent - this.to.receivedOf(this.stream));
    const now = Math.min(window, this.count - this.sent, this.from.room);
    if (now < Math.min(BATCH, this.count - this.sent)) return;
    this.from.send(this.to, this.stream, this.sent, now);
    this.sent += now;
  }
}
