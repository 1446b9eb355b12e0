import { struct } from "../../base/layout.ts";
import type { OwnedFd } from "../../native/fd.ts";
import { memfd, pread, pwrite } from "../../native/sys.ts";

/**
 * Whether what a keeper has is what there is: a page that keeper and daemon have in common. A keeper that hangs is given
 * nothing any more, and a later daemon may find it well, with records of the past.
 */
const PAGE = struct("freshness", 4, { stale: [0, "u32"] });
const PAGE_SIZE = 4096;

/** Made for one connection to a keeper. */
export class Freshness implements Disposable {
  private readonly page = memfd("vfe-vhostd-freshness", PAGE_SIZE);

  /** Borrowed. */
  get fd(): number {
    return this.page.number;
  }

  /** From now on the keeper has what there is; so it is in the beginning. */
  begin(): void {
    pwrite(this.page.number, PAGE.encode({ stale: 0 }), 0);
  }

  /** From now on the keeper does not have what there is. */
  end(): void {
    pwrite(this.page.number, PAGE.encode({ stale: 1 }), 0);
  }

  [Symbol.dispose](): void {
    this.page[Symbol.dispose]();
  }
}

/** Of an earlier daemon's page. */
export function isStale(page: OwnedFd): boolean {
  const bytes = new Uint8Array(PAGE.size);
  return pread(page.number, bytes, 0) !== bytes.length || PAGE.read(bytes).stale !== 0;
}
