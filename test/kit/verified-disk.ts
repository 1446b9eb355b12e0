import { BlkStatus, blkResult, readRequest, SECTOR, writeRequest } from "./blk-requests.ts";
import type { DriverQueue } from "./driver-queue.ts";

/** Writes random data to random blocks of a disk of its own range, and knows what must come back. */
export class VerifiedDisk {
  private readonly written = new Map<number, Uint8Array>();
  /** Requests completed and found right. */
  verified = 0;

  /**
   * @param first the first block of the range
   * @param blocks how many
   * @param blockSize bytes, a multiple of 512
   */
  constructor(
    private readonly first = 0,
    private readonly blocks = 256,
    private readonly blockSize = 4096,
  ) {}

  /** One block is written, or one that was written before is read and compared. @throws Error where it differs */
  async step(queue: DriverQueue): Promise<void> {
    const block = this.first + Math.floor(Math.random() * this.blocks);
    const sector = (block * this.blockSize) / SECTOR;
    const expected = this.written.get(block);
    if (expected === undefined || Math.random() < 0.5) {
      const data = crypto.getRandomValues(new Uint8Array(this.blockSize));
      const { readable, writable } = writeRequest(sector, data);
      const { status } = blkResult(await queue.request(readable, writable));
      if (status !== BlkStatus.ok) throw new Error(`write of block ${block}: status ${status}`);
      this.written.set(block, data);
    } else {
      const { readable, writable } = readRequest(sector, this.blockSize);
      const { status, data } = blkResult(await queue.request(readable, writable));
      if (status !== BlkStatus.ok) throw new Error(`read of block ${block}: status ${status}`);
      if (!Buffer.from(data).equals(expected)) throw new Error(`block ${block} came back different`);
    }
    this.verified++;
  }

  async steps(queue: DriverQueue, count: number): Promise<void> {
    for (let i = 0; i < count; i++) await this.step(queue);
  }

  /** Goes on until it is stopped; one request at a time. */
  runOn(queue: DriverQueue): BackgroundIo {
    return new BackgroundIo(() => this.step(queue));
  }
}

/** Verified requests, one after the other, while a test does other things. */
export class BackgroundIo {
  private stopping = false;
  private readonly running: Promise<void>;
  /** Requests done. */
  done = 0;

  constructor(step: () => Promise<void>) {
    this.running = this.run(step);
    this.running.catch(() => {});
  }

  /** @returns how many requests were verified. @throws what went wrong */
  async stop(): Promise<number> {
    this.stopping = true;
    await this.running;
    return this.done;
  }

  private async run(step: () => Promise<void>): Promise<void> {
    while (!this.stopping) {
      await step();
      this.done++;
    }
  }
}
