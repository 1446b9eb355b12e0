import type { Json } from "../base/json.ts";
import type { OwnedFd } from "../native/fd.ts";
import type { BusEntry } from "../pci/bus.ts";
import { DmaDomain } from "../pci/dma-domain.ts";
import { createAddressSpace } from "../pci/open.ts";
import type { Keeper } from "./keeper.ts";
import { closing, type DomainRecord, parseDomainRecord, RECORD_VERSION } from "./record.ts";

type Transport = BusEntry["transport"]["kind"];

/**
 * The DMA domains of this daemon: one for each VM and transport. A VM is named by its UUID; a VF without one is a
 * domain of its own. Functions of different VMs never share one.
 */
export class DomainTable {
  private readonly domains = new Map<string, { domain: DmaDomain; users: number }>();

  constructor(private readonly keeper: Keeper) {}

  /** The domain's name, for its record. */
  static key(vm: string, transport: Transport): string {
    return `${transport}/${vm}`;
  }

  /** Each acquire is answered by one release. */
  acquire(vm: string, transport: Transport): DmaDomain {
    const key = DomainTable.key(vm, transport);
    let entry = this.domains.get(key);
    if (entry === undefined) {
      entry = { domain: new DmaDomain(createAddressSpace(transport)), users: 0 };
      this.domains.set(key, entry);
    }
    entry.users++;
    return entry.domain;
  }

  async release(vm: string, transport: Transport): Promise<void> {
    const key = DomainTable.key(vm, transport);
    const entry = this.domains.get(key);
    if (entry === undefined || --entry.users > 0) return;
    this.domains.delete(key);
    entry.domain.abandon();
    await this.keeper.delete(`domain/${key}`);
  }

  /** Writes the domain's record to the keeper: what is mapped, with the files. */
  async checkpoint(vm: string, transport: Transport): Promise<void> {
    const key = DomainTable.key(vm, transport);
    const domain = this.domains.get(key)?.domain;
    if (domain === undefined) return;
    const { data, fds } = domain.snapshot();
    const record: DomainRecord = { version: RECORD_VERSION, vm, transport, domain: data };
    await this.keeper.put(`domain/${key}`, record, fds);
  }

  /**
   * Takes up a domain whose ranges are mapped already. It lives until the VFs that acquire it are gone.
   * @throws VhostdError where record and fds do not fit; the fds are closed then
   */
  revive(value: Json, fds: Map<string, OwnedFd>): void {
    using unused = closing(fds);
    const { vm, transport, domain } = parseDomainRecord(value);
    const space = createAddressSpace(transport);
    unused.move();
    this.domains.set(DomainTable.key(vm, transport), { domain: DmaDomain.revive(space, domain, fds), users: 0 });
  }

  /** After an adoption: memory of owners that could not be taken up is let go, and domains that nobody uses. */
  async prune(owners: ReadonlySet<string>): Promise<void> {
    for (const [key, { domain, users }] of [...this.domains]) {
      if (users === 0) {
        this.domains.delete(key);
        domain.abandon();
        await this.keeper.delete(`domain/${key}`);
      } else {
        for (const owner of domain.owners) if (!owners.has(owner)) await domain.releaseAll(owner);
      }
    }
  }

  /** Lets go of all domains without an unmap. */
  abandon(): void {
    for (const { domain } of this.domains.values()) domain.abandon();
    this.domains.clear();
  }
}
