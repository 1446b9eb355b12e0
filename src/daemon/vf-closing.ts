import { Deadline } from "../base/deadline.ts";
import type { Logger } from "../base/log.ts";
import type { OpenRings } from "./open-rings.ts";
import { hollowRecord } from "./record.ts";
import { closeParts, type VfOptions, type VfParts, type VfSurroundings, vfKey } from "./vf-parts.ts";

/** How the function of one VF is let go of. */
export class VfClosing {
  private lettingGo: Promise<void> | undefined;

  /**
   * @param rings what its device had not given back
   * @param hasShared a front-end was given doorbells
   */
  constructor(
    private readonly options: VfOptions,
    private readonly parts: VfParts,
    private readonly around: VfSurroundings,
    private readonly log: Logger,
    private readonly rings: OpenRings,
    private readonly hasShared: () => boolean,
  ) {}

  /** The function is closed, or just being closed. */
  get hasBegun(): boolean {
    return this.lettingGo !== undefined;
  }

  /** Status 0 before it is closed. Never rejects. */
  async lastReset(): Promise<void> {
    const deadline = Deadline.after(this.around.deadlines.detach, `reset of ${this.options.address}`);
    await this.parts.dataPath.reset(deadline).catch((error) => {
      this.log.warn("the last reset failed; the function is closed all the same", error);
    });
  }

  /** Closes the function, once; nothing of it is left in this process, and of the keeper's fds none. */
  letGo(): Promise<void> {
    this.lettingGo ??= closeParts(
      this.parts,
      this.options,
      this.around,
      () => this.reset(),
      () => this.hollow(),
    );
    return this.lettingGo;
  }

  /** The keeper knows that the VF is here, and not its function: who comes after this process opens it anew. */
  async hollow(): Promise<void> {
    const record = hollowRecord(this.options, this.rings.snapshot());
    await this.around.keeper.put(vfKey(this.options.address), () => ({ record, fds: new Map() }));
  }

  /** The keeper knows nothing of it any more. */
  async forget(): Promise<void> {
    await this.around.keeper.delete(vfKey(this.options.address));
  }

  /** @returns who can go on using the function, in words; undefined where nobody can */
  async holder(): Promise<string | undefined> {
    if (!this.hasShared()) return undefined;
    const { address } = this.options;
    const deadline = Deadline.after(this.around.deadlines.detach, `finding out who holds ${address}`);
    const holder = await this.around.stillHeld(this.parts.entry, deadline);
    if (holder === undefined) return undefined;
    const warning = `${holder}; until that ends it can be used with the memory that is mapped for its VM`;
    this.log.warn(warning);
    return warning;
  }

  /** As long as a front-end maps a doorbell, the kernel has the function open and does not reset it by itself. */
  private async reset(): Promise<void> {
    if (!this.hasShared()) return;
    const deadline = Deadline.after(this.around.deadlines.detach, `function-level reset of ${this.options.address}`);
    // The kernel would wait for it, and hold it open meanwhile.
    if (!(await this.parts.dataPath.answers(deadline))) return;
    await this.parts.fn.reset(deadline).catch((error) => {
      this.log.warn("the kernel could not reset it; it stays at status 0, kept from memory", error);
    });
  }
}
