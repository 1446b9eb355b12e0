import type { Json } from "../base/json.ts";
import type { OwnedFd } from "../native/fd.ts";
import type { TransportKind } from "../pci/bus.ts";
import { DmaDomain } from "../pci/dma-domain.ts";
import type { AddressSpaces } from "../pci/open.ts";
import type { Keeper } from "./keeper.ts";
import { closing, type DomainRecord, parseDomainRecord, RECORD_VERSION } from "./record.ts";

interface Entry {
  readonly domain: DmaDomain;
  users: number;
  readonly vm: string;
  readonly transport: TransportKind;
}

/**
 * The DMA domains of this daemon: one for each VM and transport. A VM is named by its UUID; a VF without one is a
 * domain of its own. Functions of different VMs never share one.
 */
export class DomainTable {
  private readonly domains = new Map<string, Entry>();

  constructor(
    private readonly keeper: Keeper,
    private readonly spaces: AddressSpaces,
  ) {}

  /** The domain's name, for its record. */
  private static key(vm: string, transport: TransportKind): string {
    return `${transport}/${vm}`;
  }

  /** Each acquire is answered by one release. */
  acquire(vm: string, transport: TransportKind): DmaDomain {
    const key = DomainTable.key(vm, transport);
    let entry = this.domains.get(key);
    if (entry === undefined) {
      entry = { domain: new DmaDomain(this.spaces(transport, vm)), users: 0, vm, transport };
      this.domains.set(key, entry);
    }
    entry.users++;
    return entry.domain;
  }

  async release(vm: string, transport: TransportKind): Promise<void> {
    const key = DomainTable.key(vm, transport);
    const entry = this.domains.get(key);
    if (entry === undefined || --entry.users > 0) return;
    await this.drop(key, entry.domain);
  }

  /** Writes the domain's record to the keeper: what is mapped, with the files. One without any needs none. */
  async checkpoint(vm: string, transport: TransportKind): Promise<void> {
    const key = DomainTable.key(vm, transport);
    const domain = this.domains.get(key)?.domain;
    if (domain === undefined) return;
    if (domain.owners.length === 0) return await this.keeper.delete(recordKey(key));
    await this.keeper.put(recordKey(key), () => {
      const { data, fds } = domain.snapshot();
      const record: DomainRecord = { version: RECORD_VERSION, vm, transport, domain: data };
      return { record, fds };
    });
  }

  /**
   * Takes up a domain whose ranges are mapped already. It lives until the VFs that acquire it are gone.
   * @throws VhostdError where record and fds do not fit; the fds are closed then
   */
  revive(value: Json, fds: Map<string, OwnedFd>): void {
    using unused = closing(fds);
    const { vm, transport, domain } = parseDomainRecord(value);
    const space = this.spaces(transport, vm);
    unused.move();
    const revived = DmaDomain.revive(space, domain, fds);
    this.domains.set(DomainTable.key(vm, transport), { domain: revived, users: 0, vm, transport });
  }

  /** After an adoption: memory of owners that could not be taken up is let go, and domains that nobody uses. */
  async prune(owners: ReadonlySet<string>): Promise<void> {
    for (const [key, { domain, users, vm, transport }] of [...this.domains]) {
      const absent = domain.owners.filter((owner) => !owners.has(owner));
      for (const owner of absent) if (users > 0) await domain.releaseAll(owner);
      if (users === 0) await this.drop(key, domain);
      else if (absent.length > 0) await this.checkpoint(vm, transport);
    }
  }

  /** Lets go of all domains without an unmap. */
  abandon(): void {
    for (const { domain } of this.domains.values()) domain.abandon();
    this.domains.clear();
  }

  /** Nobody uses the domain any more; its functions, which held the mappings, are gone. */
  private async drop(key: string, domain: DmaDomain): Promise<void> {
    this.domains.delete(key);
    domain.abandon();
    await this.keeper.delete(recordKey(key));
  }
}

function recordKey(key: string): string {
  return `domain/${key}`;
}
