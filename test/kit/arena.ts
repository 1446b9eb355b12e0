/** Hands out parts of an address range, first fit. Addresses and sizes in bytes. */
export class Arena {
  private readonly free: { start: number; end: number }[];
  private readonly taken = new Map<number, number>();

  constructor(
    readonly start: number,
    readonly size: number,
  ) {
    this.free = [{ start, end: start + size }];
  }

  /** @throws RangeError where no part is big enough */
  take(size: number, alignment = 16): number {
    for (const [index, hole] of this.free.entries()) {
      const start = Math.ceil(hole.start / alignment) * alignment;
      const end = start + Math.max(size, 1);
      if (end > hole.end) continue;
      const rest = [
        { start: hole.start, end: start },
        { start: end, end: hole.end },
      ];
      this.free.splice(index, 1, ...rest.filter((part) => part.start < part.end));
      this.taken.set(start, end);
      return start;
    }
    throw new RangeError(`no ${size} bytes are left of ${this.size}`);
  }

  give(start: number): void {
    const end = this.taken.get(start);
    if (end === undefined) throw new RangeError(`0x${start.toString(16)} was not taken`);
    this.taken.delete(start);
    let index = this.free.findIndex((hole) => hole.start >= end);
    if (index < 0) index = this.free.length;
    const joined = { start, end };
    if (this.free[index]?.start === end) joined.end = this.free.splice(index, 1)[0]!.end;
    if (index > 0 && this.free[index - 1]!.end === start) joined.start = this.free.splice(--index, 1)[0]!.start;
    this.free.splice(index, 0, joined);
  }
}
