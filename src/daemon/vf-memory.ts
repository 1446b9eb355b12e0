import type { PciAddress } from "../pci/address.ts";
import type { DmaRange } from "../pci/address-space.ts";
import type { DmaDomain } from "../pci/dma-domain.ts";

/** The guest memory that the front-end of one VF gives, in the domain that all VFs of its VM share. */
export class VfMemory {
  /** @param checkpoint writes the domain's record to the keeper */
  constructor(
    private readonly owner: PciAddress,
    private readonly domain: DmaDomain,
    private readonly checkpoint: () => Promise<void>,
  ) {}

  /** The fd is borrowed for the call. */
  async map(range: DmaRange, fd: number): Promise<void> {
    await using undo = new AsyncDisposableStack();
    await this.domain.claim(this.owner, range, fd);
    undo.defer(() => this.domain.release(this.owner, range));
    await this.checkpoint();
    undo.move();
  }

  async unmap(range: DmaRange): Promise<void> {
    await this.domain.release(this.owner, range);
    await this.checkpoint();
  }

  /** End of guest memory, guest-physical, exclusive; 0 where there is none. */
  get end(): number {
    return this.domain.endOf(this.owner);
  }

  /** A map that is under way ends before its next piece: nobody wants the rest. */
  giveUp(): void {
    this.domain.giveUp(this.owner);
  }

  /** Whatever is left of it. */
  async clear(): Promise<void> {
    await this.domain.releaseAll(this.owner);
    await this.checkpoint();
  }
}
