import { Deadline } from "../../src/base/deadline.ts";
import { BlkStatus, blkResult, readRequest, SECTOR, writeRequest } from "./blk-requests.ts";
import type { DriverQueue } from "./driver-queue.ts";

/** Milliseconds. */
const PROGRESS_TIMEOUT = 30_000;

/**
 * Writes random data to random blocks of a disk of its own range, and knows what must come back. Several requests may be
 * under way, never two of the same block.
 */
export class VerifiedDisk {
  private readonly written = new Map<number, Uint8Array>();
  private readonly busy = new Set<number>();
  /** Requests completed and found right. */
  verified = 0;

  /**
   * @param first the first block of the range
   * @param blocks how many; more than requests under way
   * @param blockSize bytes, a multiple of 512
   */
  constructor(
    private readonly first = 0,
    private readonly blocks = 256,
    private readonly blockSize = 4096,
  ) {}

  /**
   * One block is written, or one that was written before is read and compared. After a failure nothing is known of the
   * block: its request may have been carried out all the same.
   * @throws Error where it differs, or the request was not answered
   */
  async step(queue: DriverQueue): Promise<void> {
    const block = this.idleBlock();
    this.busy.add(block);
    try {
      const expected = this.written.get(block);
      if (expected === undefined || Math.random() < 0.5) await this.write(queue, block);
      else await this.read(queue, block, expected);
      this.verified++;
    } catch (error) {
      this.written.delete(block);
      throw error;
    } finally {
      this.busy.delete(block);
    }
  }

  async steps(queue: DriverQueue, count: number): Promise<void> {
    for (let i = 0; i < count; i++) await this.step(queue);
  }

  /** Reads and compares everything that was written. */
  async verifyAll(queue: DriverQueue): Promise<void> {
    for (const [block, expected] of this.written) await this.read(queue, block, expected);
  }

  /** Goes on until it is stopped. @param depth requests under way */
  runOn(queue: DriverQueue, depth = 1): BackgroundIo {
    return new BackgroundIo(() => this.step(queue), depth);
  }

  private async write(queue: DriverQueue, block: number): Promise<void> {
    const data = crypto.getRandomValues(new Uint8Array(this.blockSize));
    const { readable, writable } = writeRequest(this.sector(block), data);
    const { status } = blkResult(await queue.request(readable, writable));
    if (status !== BlkStatus.ok) throw new Error(`write of block ${block}: status ${status}`);
    this.written.set(block, data);
  }

  private async read(queue: DriverQueue, block: number, expected: Uint8Array): Promise<void> {
    const { readable, writable } = readRequest(this.sector(block), this.blockSize);
    const { status, data } = blkResult(await queue.request(readable, writable));
    if (status !== BlkStatus.ok) throw new Error(`read of block ${block}: status ${status}`);
    if (!Buffer.from(data).equals(expected)) throw new Error(`block ${block} came back different`);
  }

  private idleBlock(): number {
    for (;;) {
      const block = this.first + Math.floor(Math.random() * this.blocks);
      if (!this.busy.has(block)) return block;
    }
  }

  private sector(block: number): number {
    return (block * this.blockSize) / SECTOR;
  }
}

/** Verified requests in one or several lanes, each one after the other, while a test does other things. */
export class BackgroundIo {
  private stopping = false;
  private paused: PromiseWithResolvers<void> | undefined;
  private failure: unknown;
  private readonly running: Promise<unknown>;
  /** Requests done. */
  done = 0;

  constructor(step: () => Promise<void>, lanes = 1) {
    this.running = Promise.all(Array.from({ length: lanes }, () => this.run(step)));
  }

  /** @returns how many requests were verified. @throws what went wrong */
  async stop(): Promise<number> {
    await this.abandon();
    if (this.failure !== undefined) throw this.failure;
    return this.done;
  }

  /** Ends it, whatever becomes of the requests under way. */
  async abandon(): Promise<void> {
    this.stopping = true;
    this.resume();
    await this.running;
  }

  /** No request is begun from now on, as in a guest whose processors were stopped. Those under way may end. */
  pause(): void {
    this.paused ??= Promise.withResolvers();
  }

  resume(): void {
    this.paused?.resolve();
    this.paused = undefined;
  }

  /** Resolves when so many requests more are done. @throws what went wrong; VhostdError timedOut */
  async progress(requests: number): Promise<void> {
    const wanted = this.done + requests;
    await Deadline.after(PROGRESS_TIMEOUT, `I/O of ${requests} requests`).poll(() => {
      if (this.failure !== undefined) throw this.failure;
      return this.done >= wanted || undefined;
    }, 1);
  }

  private async run(step: () => Promise<void>): Promise<void> {
    try {
      while (!this.stopping) {
        await step();
        this.done++;
        await this.paused?.promise;
      }
    } catch (error) {
      this.failure ??= error;
      this.stopping = true;
    }
  }
}
