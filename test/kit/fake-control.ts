import { DmaDomain } from "../../src/pci/dma-domain.ts";
import { type FakeChain, FakeDeviceRing, FakeDma } from "./fake-dma.ts";
import type { FakeFunction } from "./fake-function.ts";

/** What the device gives back: a descriptor, how much it says to have written, and what it wrote. */
export interface FakeControlAnswer {
  readonly id: number;
  readonly length: number;
  readonly bytes: Uint8Array;
}

/**
 * The control queue of a fake function, device side. It accepts everything (one byte, 0) until `answer` is replaced.
 */
export class FakeControl implements Disposable {
  /** Requests, oldest first. */
  readonly seen: Uint8Array[] = [];
  /** undefined: never. */
  answer: (request: Uint8Array, honest: FakeControlAnswer) => FakeControlAnswer | undefined = (_, honest) => honest;
  readonly ring: FakeDeviceRing;
  readonly domain: DmaDomain;
  private readonly dma = new FakeDma();

  constructor(
    private readonly fn: FakeFunction,
    private readonly queue: number,
  ) {
    this.ring = new FakeDeviceRing(this.dma, () => fn.queues[queue]!);
    this.domain = new DmaDomain(this.dma);
    fn.onRing = (rung) => {
      if (rung === queue) this.serve();
    };
    fn.onReset = () => this.ring.restart();
  }

  /** Pages of memory that the function reaches. */
  get mapped(): number {
    return this.dma.files.length;
  }

  [Symbol.dispose](): void {
    this.domain.abandon();
    this.dma[Symbol.dispose]();
  }

  private serve(): void {
    if (this.fn.queues[this.queue]!.enable === 0) return;
    for (let chain = this.ring.take(); chain !== undefined; chain = this.ring.take()) this.execute(chain);
  }

  private execute({ head, readable, writable }: FakeChain): void {
    const request = Uint8Array.from(readable.flatMap(({ address, length }) => [...this.dma.read(address, length)]));
    this.seen.push(request);
    const answer = this.answer(request, { id: head, length: 1, bytes: Uint8Array.of(0) });
    if (answer === undefined) return;
    this.dma.write(writable[0]!.address, answer.bytes);
    this.ring.complete(answer.id, answer.length);
  }
}
