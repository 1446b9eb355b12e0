import { expect, test } from "bun:test";
import fc from "fast-check";
import { liveFds } from "../../../src/native/fd.ts";
import { fileInfo, memfd } from "../../../src/native/sys.ts";
import type { AddressSpace, DmaRange } from "../../../src/pci/address-space.ts";
import { DmaDomain } from "../../../src/pci/dma-domain.ts";

const PAGE = 4096;
const PAGES = 16;
const OWNERS = ["a", "b", "c"];

/** One step of one owner: a claim to some pages, the release of its n-th claim, or of all. */
const step = fc.record({
  owner: fc.constantFrom(...OWNERS),
  what: fc.constantFrom("claim", "claim", "release", "releaseAll"),
  first: fc.nat(PAGES - 1),
  pages: fc.integer({ min: 1, max: PAGES }),
  fails: fc.boolean(),
});

/** What is mapped, by page: an error where it is mapped twice or unmapped otherwise than it was mapped. */
class PageSpace implements AddressSpace {
  readonly open = unused;
  readonly revive = unused;
  readonly [Symbol.dispose] = () => {};
  readonly ioRanges = [{ start: 0, end: 2 ** 40 }];
  readonly pageSize = PAGE;
  readonly mapped = new Map<number, number>();
  mapsLeft = Number.POSITIVE_INFINITY;

  get pages(): Set<number> {
    return new Set([...this.mapped].flatMap(([iova, size]) => pagesOf({ iova, size })));
  }

  async map(range: DmaRange): Promise<void> {
    if (this.mapsLeft-- <= 0) throw new Error("no more mappings");
    expect(range.offset).toBe(range.iova);
    for (const page of pagesOf(range)) expect(this.pages.has(page)).toBe(false);
    this.mapped.set(range.iova, range.size);
  }

  async unmap(range: DmaRange): Promise<void> {
    expect(this.mapped.get(range.iova)).toBe(range.size);
    this.mapped.delete(range.iova);
  }

  async unmapIfThere(range: DmaRange): Promise<void> {
    await this.unmap(range);
  }

  async attach(): Promise<void> {}
  async detach(): Promise<void> {}
  adopt(): void {}
}

function pagesOf({ iova, size }: { iova: number; size: number }): number[] {
  return Array.from({ length: size / PAGE }, (_, i) => iova / PAGE + i);
}

test("what is mapped covers the claims, and nothing is mapped that no claim touches", async () => {
  using file = memfd("memory", PAGES * PAGE);
  const { dev, ino } = fileInfo(file.number);
  const property = fc.asyncProperty(fc.array(step, { maxLength: 40 }), async (steps) => {
    const space = new PageSpace();
    const domain = new DmaDomain(space);
    const claims = new Map<string, DmaRange[]>(OWNERS.map((owner) => [owner, []]));
    for (const { owner, what, first, pages, fails } of steps) {
      const held = claims.get(owner)!;
      const size = Math.min(pages, PAGES - first) * PAGE;
      const range = { iova: first * PAGE, size, offset: first * PAGE, file: { dev, ino } };
      const before = new Map(space.mapped);
      if (what === "claim") {
        space.mapsLeft = fails ? 1 : Number.POSITIVE_INFINITY;
        const refused = await domain.claim(owner, range, file.number).then(
          () => false,
          () => true,
        );
        if (refused) expect(space.mapped).toEqual(before);
        else if (!held.some(({ iova, size: other }) => iova === range.iova && other === size)) held.push(range);
      } else if (what === "release" && held.length > 0) {
        await domain.release(owner, held.splice(first % held.length, 1)[0]!);
      } else if (what === "releaseAll") {
        held.length = 0;
        await domain.releaseAll(owner);
      }
      const all = [...claims.values()].flat();
      const wanted = new Set(all.flatMap(pagesOf));
      expect(wanted.difference(space.pages).size).toBe(0);
      for (const [iova, length] of space.mapped) {
        expect(pagesOf({ iova, size: length }).some((page) => wanted.has(page))).toBe(true);
      }
      expect(liveFds()).toBe(1 + space.mapped.size);
    }
    for (const owner of OWNERS) await domain.releaseAll(owner);
    expect(space.mapped.size).toBe(0);
  });
  await fc.assert(property, { numRuns: 60 });
});

/** The domain under test passes these on; nothing here has functions to open. */
function unused(): never {
  throw new Error("opens no functions");
}
