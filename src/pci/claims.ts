import type { DmaRange } from "./address-space.ts";
import { type Extent, extentOf, overlaps } from "./ranges.ts";

/** What the owners of a DMA domain claim. */
export class Claims {
  private readonly byOwner = new Map<string, readonly DmaRange[]>();

  /** Those who hold anything. */
  get owners(): string[] {
    return [...this.byOwner.keys()];
  }

  get all(): Iterable<readonly [owner: string, ranges: readonly DmaRange[]]> {
    return this.byOwner;
  }

  of(owner: string): readonly DmaRange[] {
    return this.byOwner.get(owner) ?? [];
  }

  set(owner: string, ranges: readonly DmaRange[]): void {
    if (ranges.length === 0) this.byOwner.delete(owner);
    else this.byOwner.set(owner, ranges);
  }

  /** Who claims any part of it. */
  holdersOf(extent: Extent): string[] {
    const claims = [...this.byOwner].filter(([, ranges]) => ranges.some((range) => overlaps(extentOf(range), extent)));
    return claims.map(([owner]) => owner);
  }

  clear(): void {
    this.byOwner.clear();
  }
}
