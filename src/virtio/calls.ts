import type { PciFunction } from "../pci/function.ts";

/** The vectors of a function's queues, routed to the calls of a front-end. That of queue n is n + 1. */
export class Calls {
  /** Vectors are being let go. Rejects as the function does. */
  private leaving: Promise<unknown> = Promise.resolve();

  constructor(private readonly interrupts: PciFunction["interrupts"]) {}

  /** @param call borrowed for the call; null for none */
  route(queue: number, call: number | null): Promise<void> {
    return this.interrupts.route(queue + 1, call);
  }

  /** In the background: see `settled`. */
  letGo(queues: Iterable<number>): void {
    this.leaving = Promise.all([this.leaving, ...[...queues].map((queue) => this.route(queue, null))]);
    this.leaving.catch(() => {});
  }

  /** Resolves when all that was let go is gone. @throws what the function has said to it since the last time */
  async settled(): Promise<void> {
    const { leaving } = this;
    this.leaving = Promise.resolve();
    await leaving;
  }
}
