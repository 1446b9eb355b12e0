import { asError, VhostdError } from "../base/errors.ts";
import type { Logger } from "../base/log.ts";
import type { PciAddress } from "../pci/address.ts";
import type { DmaRange } from "../pci/address-space.ts";
import type { DmaDomain } from "../pci/dma-domain.ts";

/**
 * The guest memory that the front-end of one VF gives, in the domain that all VFs of its VM share. A message of the front-end may
 * be handled again by the next process: each of these done twice is done once.
 */
export class VfMemory {
  constructor(
    private readonly owner: PciAddress,
    private readonly domain: DmaDomain,
  ) {}

  /** The fd is borrowed for the call. */
  async map(range: DmaRange, fd: number): Promise<void> {
    await this.domain.claim(this.owner, range, fd);
  }

  /** Of what is not there, nothing. */
  async unmap(range: DmaRange): Promise<void> {
    await this.domain.release(this.owner, range).catch((error) => {
      if (!(error instanceof VhostdError && error.code === "notFound")) throw error;
    });
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
  }

  /** As clear, where a session has left something: it never hears of what an earlier process had mapped for it, and died. Never rejects. */
  async clearRest(log: Logger): Promise<void> {
    if (this.end === 0) return;
    await this.clear().catch((error) => log.error("guest memory stays mapped", asError(error)));
  }
}
