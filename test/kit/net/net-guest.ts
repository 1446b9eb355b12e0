import { usedIndex } from "../../../src/virtio/split-ring.ts";
import type { QueueOptions } from "../frontend/frontend.ts";
import { LonelyGuest } from "../frontend/hang-up.ts";
import { type Mac, macOf } from "./frames.ts";
import type { NetFrontend } from "./net-frontend.ts";
import { NetPair } from "./net-pair.ts";
import { FrameSink, FrameStream, type StreamOptions } from "./streams.ts";

const MEMORY = [
  { gpa: 0, size: 1 << 20 },
  { gpa: 2 ** 32, size: 8 << 20 },
];
/**
 * Entries of each ring, and bytes of buffers behind it: there is room for all that four streams have under way, so that a
 * device has no reason to lose any of it.
 */
const RING = { size: 256, bufferSpace: 512 << 10 } as const;

export interface BootOptions extends Pick<QueueOptions, "size" | "firstIndex"> {
  /** Of its device, as the guest's owner has set it; the device is not asked then. */
  readonly mac?: Mac;
}

/** A guest with a network driver behind a front-end: all its pairs wait for frames from the start. */
export class NetGuest implements Disposable {
  readonly sink = new FrameSink();
  readonly pairs: readonly NetPair[];

  private constructor(
    public frontend: NetFrontend,
    readonly mac: Mac,
  ) {
    const { memory, queues, mergeable } = frontend;
    this.pairs = Array.from({ length: queues.length >> 1 }, (_, pair) => {
      const [receive, transmit] = [queues[2 * pair]!.driver, queues[2 * pair + 1]!.driver];
      const onFailure = (error: Error) => this.sink.fail(error);
      return new NetPair(memory, receive, transmit, {
        mergeable,
        onFrame: (frame) => this.sink.take(pair, frame),
        onFailure,
      });
    });
  }

  /** Brings a front-end that has just connected to the point where its guest's network runs. It is the guest's then. */
  static async boot(frontend: NetFrontend, { mac, ...queues }: BootOptions = {}): Promise<NetGuest> {
    using undo = new DisposableStack();
    undo.use(frontend);
    await frontend.negotiate();
    const own = mac ?? (await readMac(frontend));
    await frontend.setupMemory(MEMORY);
    await frontend.startQueues(2 * frontend.pairs, { ...RING, ...queues });
    undo.move();
    return new NetGuest(frontend, own);
  }

  /** The guest behind a front-end whose queues run already. */
  static adopt(frontend: NetFrontend, mac: Mac): NetGuest {
    return new NetGuest(frontend, mac);
  }

  /** Verified frames from a pair of this guest to another guest, until it is stopped. */
  stream(pair: number, to: NetGuest, pacing: Pick<StreamOptions, "window" | "interval"> = {}): FrameStream {
    return new FrameStream(this.pairs[pair]!, to.sink, { to: to.mac, from: this.mac, ...pacing });
  }

  /** One from each pair in use. */
  streams(to: NetGuest, pacing: Pick<StreamOptions, "window" | "interval"> = {}): FrameStream[] {
    return this.pairs.slice(0, this.frontend.enabled).map((_, pair) => this.stream(pair, to, pacing));
  }

  /** Used indices of all rings as guest memory has them. */
  get usedIndices(): number[] {
    const { memory, queues } = this.frontend;
    return queues.map(({ driver: { ring } }) => usedIndex(memory, ring));
  }

  /** The connection is lost in the middle of everything, and another one is made. @param dial makes it */
  async reconnect(dial: () => NetFrontend, whileAway: () => Promise<void> = async () => {}): Promise<void> {
    using lonely = LonelyGuest.hangUp(this.frontend);
    await whileAway();
    using undo = new DisposableStack();
    const next = undo.use(dial());
    await lonely.meet(next);
    undo.move();
    this.frontend = next;
  }

  /** @throws Error where the device has done something to a buffer that it must not */
  async checkBuffers(): Promise<void> {
    for (const pair of this.pairs) await pair.checkUntouched();
    if (this.sink.failure !== undefined) throw this.sink.failure;
  }

  [Symbol.dispose](): void {
    this.frontend[Symbol.dispose]();
  }
}

async function readMac(frontend: NetFrontend): Promise<Mac> {
  const bytes = await frontend.getConfig(0, 6);
  if (bytes === undefined) throw new Error("the device does not say its MAC address");
  return macOf(bytes);
}
