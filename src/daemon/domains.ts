import type { Deadline } from "../base/deadline.ts";
import type { Json } from "../base/json.ts";
import type { OwnedFd } from "../native/fd.ts";
import type { StoredSpace } from "../pci/address-space.ts";
import type { TransportKind } from "../pci/bus.ts";
import { DmaDomain, type DmaDomainOptions } from "../pci/dma-domain.ts";
import { Failures } from "../pci/failures.ts";
import type { AddressSpaces } from "../pci/open.ts";
import type { Keeper } from "./keeper.ts";
import { closing, type DomainRecord, parseDomainRecord, RECORD_VERSION } from "./record.ts";

interface Entry {
  readonly domain: DmaDomain;
  users: number;
  /** An earlier process had it: what is mapped there is known. */
  readonly revived: boolean;
  /** There is a record of it. */
  stored: boolean;
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
      const domain = new DmaDomain(this.spaces(transport, vm), this.noting(vm, transport));
      entry = { domain, users: 0, vm, transport, revived: false, stored: false };
      this.domains.set(key, entry);
    }
    entry.users++;
    return entry.domain;
  }

  async release(vm: string, transport: TransportKind): Promise<void> {
    const key = DomainTable.key(vm, transport);
    const entry = this.domains.get(key);
    if (entry === undefined) return;
    // Its function is closed: the address space may be kept by less.
    if (--entry.users > 0) await this.checkpoint(vm, transport);
    else await this.drop(key, entry.domain);
  }

  /** Writes the domain's record to the keeper. It is written by itself wherever memory is mapped or unmapped. */
  async checkpoint(vm: string, transport: TransportKind): Promise<void> {
    const key = DomainTable.key(vm, transport);
    const entry = this.domains.get(key);
    if (entry === undefined) return;
    const { domain } = entry;
    // One that was there stays as long as there are VFs, which do not go on without it.
    if (domain.isEmpty && !entry.stored) return;
    entry.stored = true;
    await this.keeper.put(recordKey(key), () => {
      const { data, fds } = domain.snapshot();
      const record: DomainRecord = { version: RECORD_VERSION, vm, transport, domain: data };
      return { record, fds };
    });
  }

  /** To a keeper that has nothing. */
  async checkpointAll(): Promise<void> {
    await Promise.all([...this.domains.values()].map(({ vm, transport }) => this.checkpoint(vm, transport)));
  }

  /**
   * Takes up a domain whose ranges are mapped already. It lives until the VFs that acquire it are gone. No word to anyone.
   * @throws VhostdError where record and fds do not fit; the fds are closed then
   */
  revive(value: Json, fds: Map<string, OwnedFd>): void {
    using unused = closing(fds);
    const { vm, transport, domain } = parseDomainRecord(value);
    unused.move();
    const makeSpace = (stored: StoredSpace | undefined) => this.spaces(transport, vm, stored);
    const revived = DmaDomain.revive(makeSpace, domain, fds, this.noting(vm, transport));
    this.domains.set(DomainTable.key(vm, transport), {
      ...{ domain: revived, users: 0, vm, transport },
      ...{ revived: true, stored: true },
    });
  }

  /** An earlier process had it, and it was revived. */
  isRevived(vm: string, transport: TransportKind): boolean {
    return this.domains.get(DomainTable.key(vm, transport))?.revived === true;
  }

  /**
   * Ends what was under way in any domain when the process before this one died: after the VFs were revived, before anything
   * else. All are tried.
   * @throws VhostdError the first failure: memory that stays mapped
   */
  async takeUp(deadline: Deadline): Promise<void> {
    // Over vfio-user the functions are told: as long as there is none, it waits for the next change.
    const used = [...this.domains.values()].filter(({ users, transport }) => users > 0 || transport === "vfio");
    const failures = new Failures();
    await Promise.all(used.map(({ domain }) => failures.of(domain.takeUp(deadline))));
    failures.check();
  }

  /**
   * After an adoption: memory of owners that could not be taken up is let go, and domains that nobody uses. All are tried.
   * @throws VhostdError the first failure
   */
  async prune(owners: ReadonlySet<string>): Promise<void> {
    const failures = new Failures();
    for (const [key, { domain, users }] of [...this.domains]) {
      const absent = domain.owners.filter((owner) => !owners.has(owner));
      for (const owner of absent) if (users > 0) await failures.of(domain.releaseAll(owner));
      await failures.of(users === 0 ? this.drop(key, domain) : domain.adoptedAll());
    }
    failures.check();
  }

  /** Lets go of all domains without an unmap. */
  abandon(): void {
    for (const { domain } of this.domains.values()) domain.abandon();
    this.domains.clear();
  }

  private noting(vm: string, transport: TransportKind): DmaDomainOptions {
    return { note: () => this.checkpoint(vm, transport) };
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
