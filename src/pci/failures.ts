/** Of steps that are all taken, whichever fails. */
export class Failures {
  private readonly seen: unknown[] = [];

  /** @returns whether it succeeded */
  async of(work: Promise<void> | undefined): Promise<boolean> {
    try {
      await work;
      return true;
    } catch (error) {
      this.seen.push(error);
      return false;
    }
  }

  /** @throws the first of them */
  check(): void {
    if (this.seen.length > 0) throw this.seen[0];
  }
}
