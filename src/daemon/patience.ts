import { Deadline } from "../base/deadline.ts";

/**
 * Work that may take as long as a device's slowest request. Where its VF is to be removed an operator waits, and there
 * is less time: for work that begins then and for what goes on already.
 */
export class Patience {
  private readonly deadlines = new Set<Deadline>();
  private hurried = false;

  /** @param last milliseconds once `hurry` was called */
  constructor(private readonly last: number) {}

  /**
   * @param what is waited for
   * @param usual milliseconds
   */
  async during<T>(what: string, usual: number, work: (deadline: Deadline) => Promise<T>): Promise<T> {
    const deadline = Deadline.after(this.hurried ? Math.min(usual, this.last) : usual, what);
    this.deadlines.add(deadline);
    try {
      return await work(deadline);
    } finally {
      this.deadlines.delete(deadline);
    }
  }

  hurry(): void {
    this.hurried = true;
    for (const deadline of this.deadlines) deadline.shorten(this.last);
  }
}
