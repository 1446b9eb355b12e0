/** Runs operations one after the other, in the order they were asked for. One queue a VF: operations never interleave. */
export class OperationQueue {
  private tail: Promise<unknown> = Promise.resolve();
  private waiting = 0;

  /** Settles as `operation` does; a failure does not stop the operations behind it. */
  run<T>(operation: () => Promise<T>): Promise<T> {
    this.waiting++;
    const result = this.tail.then(operation);
    this.tail = result.then(
      () => this.waiting--,
      () => this.waiting--,
    );
    return result;
  }

  /** Operations asked for and not yet ended. */
  get length(): number {
    return this.waiting;
  }
}
