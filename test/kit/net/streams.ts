import { Deadline } from "../../../src/base/deadline.ts";
import { asError } from "../../../src/base/errors.ts";
import { DESCRIPTION_VARIABLE } from "../machine/description.ts";
import { encodeFrame, type Mac, readFrame, sizeOf } from "./frames.ts";
import type { NetPair } from "./net-pair.ts";

/** Milliseconds. */
const PROGRESS_TIMEOUT = 30_000;
/** Milliseconds without a frame at the other end until what is under way is taken for lost, and the stream goes on. */
const PATIENCE = 20;
/** The same for the last ones of a stream, on a machine that is busy; inside a VM everything takes its time. */
const LAST_PATIENCE = process.env[DESCRIPTION_VARIABLE] === undefined ? 300 : 5_000;
/** Added to the number of a stream for frames that do not count. */
const KNOCKING = 0x8000_0000;
/** Frames under way. */
const WINDOW = 8;

let streams = 0;

/** What has come of one stream. */
interface Arrived {
  /** Frames, each counted once. */
  received: number;
  /** The sequence number that comes next where nothing is lost. */
  next: number;
  readonly missing: Set<number>;
  duplicated: number;
  reordered: number;
  /** The pairs that it came by. */
  readonly pairs: Set<number>;
}

/** Takes the frames of a guest, whichever pair they come by, and holds each against what was sent. */
export class FrameSink {
  private readonly streams = new Map<number, Arrived>();
  private wakes: (() => void)[] = [];
  /** Frames that no stream of this kit has sent. */
  strange = 0;
  /** What went wrong first. */
  failure: Error | undefined;

  /** What came of a stream. */
  of(stream: number): Arrived {
    const known = this.streams.get(stream);
    if (known !== undefined) return known;
    const none = {
      received: 0,
      next: 0,
      missing: new Set<number>(),
      duplicated: 0,
      reordered: 0,
      pairs: new Set<number>(),
    };
    this.streams.set(stream, none);
    return none;
  }

  take(pair: number, bytes: Uint8Array): void {
    const frame = readFrame(bytes);
    if (frame === undefined) {
      this.strange++;
      return;
    }
    const { sequence, stream } = frame;
    if (bytes.length !== sizeOf(sequence) || !Buffer.from(bytes).equals(encodeFrame(frame))) {
      this.fail(new Error(`frame ${sequence} of stream ${stream} came different (${bytes.length} bytes)`));
      return;
    }
    const seen = this.of(stream);
    seen.pairs.add(pair);
    if (sequence >= seen.next) {
      for (let lost = seen.next; lost < sequence; lost++) seen.missing.add(lost);
      seen.next = sequence + 1;
      seen.received++;
    } else if (seen.missing.delete(sequence)) {
      seen.reordered++;
      seen.received++;
    } else {
      seen.duplicated++;
    }
    this.wake();
  }

  fail(error: Error): void {
    this.failure ??= error;
    this.wake();
  }

  /** Resolves at the next frame, or after so many milliseconds. @returns whether there was one */
  async next(patience: number): Promise<boolean> {
    const { promise, resolve } = Promise.withResolvers<boolean>();
    const timer = setTimeout(() => resolve(false), patience);
    this.wakes.push(() => resolve(true));
    const arrived = await promise;
    clearTimeout(timer);
    return arrived;
  }

  private wake(): void {
    for (const wake of this.wakes.splice(0)) wake();
  }
}

/** What became of the frames of a stream. */
export interface StreamResult {
  readonly lost: number;
  /** Those that came behind a later one. */
  readonly reordered: number;
}

/** Of one in which nothing went wrong. */
export const COMPLETE: StreamResult = { lost: 0, reordered: 0 };

export interface StreamOptions {
  readonly to: Mac;
  readonly from: Mac;
  /** Frames under way at most. */
  readonly window?: number;
  /** Milliseconds between two frames, for traffic that leaves the machine to others; none unless said. */
  readonly interval?: number;
}

/** Numbered frames without end from one pair to another guest, where each is verified. */
export class FrameStream {
  readonly id = ++streams;
  private stopping = false;
  private paused: PromiseWithResolvers<void> | undefined;
  private failure: Error | undefined;
  /** Frames that the device has and has not given back. */
  private sending = 0;
  private readonly running: Promise<void>;
  /** Frames that were handed to the device. */
  sent = 0;

  constructor(
    private readonly pair: NetPair,
    private readonly sink: FrameSink,
    private readonly options: StreamOptions,
  ) {
    this.running = this.run().catch((error: unknown) => {
      this.failure ??= asError(error);
    });
  }

  get arrived(): Arrived {
    return this.sink.of(this.id);
  }

  /** No frame is sent from now on, as in a guest whose processors were stopped. */
  pause(): void {
    this.paused ??= Promise.withResolvers();
  }

  resume(): void {
    this.paused?.resolve();
    this.paused = undefined;
  }

  /** Resolves when so many frames more have arrived. @throws what went wrong; VhostdError timedOut */
  async progress(frames: number): Promise<void> {
    const wanted = this.arrived.received + frames;
    await Deadline.after(PROGRESS_TIMEOUT, `${frames} frames of stream ${this.id}`).poll(() => {
      this.check();
      return this.arrived.received >= wanted || undefined;
    }, 1);
  }

  /**
   * Ends it and waits for what is under way.
   * @throws what went wrong at either end, and where a frame came twice
   */
  async stop(): Promise<StreamResult> {
    await this.abandon();
    const deadline = Deadline.after(PROGRESS_TIMEOUT, `frames of stream ${this.id} given back`);
    await deadline.poll(() => this.failure !== undefined || this.sending === 0 || undefined, 1);
    while (this.arrived.next < this.sent && (await this.advances(this.arrived, LAST_PATIENCE)));
    this.check();
    const { duplicated, reordered, received } = this.arrived;
    if (duplicated > 0) throw new Error(`of ${this.sent} frames of stream ${this.id}, ${duplicated} came twice`);
    return { lost: this.sent - received, reordered };
  }

  /** Ends it, whatever becomes of what is under way. */
  async abandon(): Promise<void> {
    this.stopping = true;
    this.resume();
    await this.running;
  }

  private check(): void {
    const failure = this.failure ?? this.sink.failure;
    if (failure !== undefined) throw failure;
  }

  /** Whether a further frame arrives before long. */
  private async advances(arrived: Arrived, patience: number): Promise<boolean> {
    const { next } = arrived;
    const end = performance.now() + patience;
    while (arrived.next === next) {
      const left = end - performance.now();
      if (left <= 0 || !(await this.sink.next(left))) return false;
    }
    return true;
  }

  /** Sends frames that do not count until one arrives: a network that has just come up loses the first ones. */
  private async knock(): Promise<void> {
    const stream = this.id + KNOCKING;
    const arrived = this.sink.of(stream);
    for (let sequence = 0; arrived.received === 0 && !this.ending; sequence++) {
      if (this.hasRoom) this.send(stream, sequence);
      await this.advances(arrived, PATIENCE);
    }
  }

  private get ending(): boolean {
    return this.stopping || this.failure !== undefined;
  }

  /** Half of the ring is for others. */
  private get hasRoom(): boolean {
    return this.pair.sending < this.pair.transmit.ring.size / 2;
  }

  private send(stream: number, sequence: number): void {
    const { to, from } = this.options;
    const frame = encodeFrame({ to, from, stream, sequence, size: sizeOf(sequence) });
    this.sending++;
    const done = () => void this.sending--;
    this.pair.send(frame).then(done, (error: unknown) => {
      this.failure ??= asError(error);
    });
  }

  private async run(): Promise<void> {
    const { window = WINDOW, interval } = this.options;
    await this.knock();
    while (!this.ending) {
      if (interval !== undefined) await Bun.sleep(interval);
      await this.paused?.promise;
      if (this.ending) return;
      if (this.sent - this.arrived.next >= window && (await this.advances(this.arrived, PATIENCE))) continue;
      // Nothing arrives: the other end is not there, or all of it was lost.
      if (this.hasRoom) this.send(this.id, this.sent++);
      else await Bun.sleep(1);
    }
  }
}
