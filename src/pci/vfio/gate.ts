/**
 * What the accesses of one function pass through. While it is shut they wait, in order: the kernel would make the thread
 * itself wait, and this is the one of all JavaScript.
 */
export class AccessGate {
  private waiting: { readonly run: () => void; readonly fail: (error: Error) => void }[] | undefined;
  private ended: Error | undefined;

  get shut(): boolean {
    return this.waiting !== undefined;
  }

  /** At once where the gate is open; accesses are begun in the order they were made. */
  pass<T>(access: () => T | Promise<T>): Promise<T> {
    const { promise, resolve, reject } = Promise.withResolvers<T>();
    const run = () => {
      try {
        resolve(access());
      } catch (error) {
        reject(error);
      }
    };
    if (this.ended !== undefined) reject(this.ended);
    else if (this.waiting === undefined) run();
    else this.waiting.push({ run, fail: reject });
    return promise;
  }

  /** Shut until `work` has settled. */
  async shutDuring(work: () => Promise<void>): Promise<void> {
    this.waiting ??= [];
    try {
      await work();
    } finally {
      const waiting = this.waiting ?? [];
      this.waiting = undefined;
      for (const { run } of waiting) run();
    }
  }

  /** Accesses that wait, and all to come, fail with this. */
  end(error: Error): void {
    this.ended ??= error;
    for (const { fail } of this.waiting?.splice(0) ?? []) fail(error);
  }
}
