import { Deadline } from "../base/deadline.ts";

/**
 * Work that may take as long as a device's slowest request. Where its VF is to be removed an operator waits, and there
 * is less time: for work that begins then and for what goes on already.
 */
export class Patience {
  private readonly deadlines = new Set<Deadline>();
  private hurried = false;

  /**
   * @param what is waited for
   * @param usual milliseconds
   * @param last milliseconds once `hurry` was called
   */
  constructor(
    private readonly what: string,
    private readonly usual: number,
    private readonly last: number,
  ) {}

  /** @param again it has been tried before: there is as little time as at the last */
  async during<T>(work: (deadline: Deadline) => Promise<T>, again = false): Promise<T> {
    const time = this.hurried || again ? Math.min(this.usual, this.last) : this.usual;
    const deadline = Deadline.after(time, this.what);
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
