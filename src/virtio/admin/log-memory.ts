import { VhostdError } from "../../base/errors.ts";
import { duplicate } from "../../native/fd.ts";
import { fileInfo } from "../../native/sys.ts";
import type { DmaDomain } from "../../pci/dma-domain.ts";
import type { DirtyLog } from "../dirty-log.ts";
import { claimMemory, type OwnMemory } from "../own-memory.ts";

/** Who holds maps of dirty pages in a PF's domain: this, and a number. */
const OWNER = "dirty pages";

/** Memory that the PF reaches, until it is released. */
export interface ReachableMemory {
  /** In the PF's own address space. */
  readonly address: number;
  /** The PF writes there no more. @throws VhostdError iommuDomain where it stays mapped */
  release(): Promise<void>;
}

/** A log that VFs of one VM have in common. */
interface Shared {
  readonly address: Promise<number>;
  readonly owner: string;
  users: number;
}

/**
 * What a PF writes to mark the pages that its VFs write: logs of front-ends, each mapped once however many VFs use it, and
 * maps of our own. All of it is in the PF's own address space, beside its admin queue.
 */
export class LogMemory {
  private readonly shared = new Map<string, Shared>();
  private claims = 0;
  private cleaned: Promise<void> = Promise.resolve();
  private readonly left: readonly string[];

  constructor(private readonly domain: DmaDomain) {
    this.left = domain.owners.filter((owner) => owner.startsWith(OWNER));
  }

  /** An earlier process has left something. */
  get hasLeft(): boolean {
    return this.left.length > 0;
  }

  /**
   * Before anything new is mapped, what an earlier process has left is unmapped.
   * @param quiet resolves once nothing marks there any more
   */
  clean(quiet: Promise<void>): Promise<void> {
    const release = async () => {
      await quiet;
      for (const owner of this.left) await this.domain.releaseAll(owner);
    };
    const cleaned = release();
    this.cleaned = cleaned.catch(() => {});
    return cleaned;
  }

  /**
   * A front-end's log. Its fd is borrowed for the call.
   * @throws VhostdError invalid where the log is not in its file; iommuDomain where there is no room
   */
  async share({ fd, offset, size }: DirtyLog): Promise<ReachableMemory> {
    const { dev, ino, size: fileSize } = fileInfo(fd);
    if (offset + size > fileSize) {
      throw new VhostdError("invalid", `a dirty log of ${size} bytes at ${offset} in a file of ${fileSize}`);
    }
    const key = [dev, ino, offset, size].join();
    const known = this.shared.get(key);
    const log = known ?? this.mapLog(fd, offset, size);
    log.users++;
    if (known === undefined) this.shared.set(key, log);
    try {
      const address = await log.address;
      return { address, release: this.once(() => this.letGo(key, log)) };
    } catch (error) {
      log.users--;
      if (this.shared.get(key) === log) this.shared.delete(key);
      throw error;
    }
  }

  /** A map of our own, zeroes. @param size bytes @throws VhostdError iommuDomain where there is no room */
  async own(size: number): Promise<ReachableMemory & { readonly memory: OwnMemory }> {
    await this.cleaned;
    const owner = this.newOwner();
    const memory = await claimMemory(this.domain, owner, size);
    const release = this.once(async () => {
      memory[Symbol.dispose]();
      await this.domain.releaseAll(owner);
    });
    return { address: memory.iova, memory, release };
  }

  private mapLog(fd: number, offset: number, size: number): Shared {
    const owner = this.newOwner();
    // Who lends it may be gone before it is mapped.
    const own = duplicate(fd);
    const map = async () => {
      using file = own;
      await this.cleaned;
      const { pageSize } = this.domain;
      const whole = Math.ceil(size / pageSize) * pageSize;
      const { iova } = await this.domain.claimFree(owner, whole, file.number, offset);
      return iova;
    };
    return { address: map(), owner, users: 0 };
  }

  private async letGo(key: string, log: Shared): Promise<void> {
    if (--log.users > 0) return;
    if (this.shared.get(key) === log) this.shared.delete(key);
    await this.domain.releaseAll(log.owner);
  }

  private newOwner(): string {
    do this.claims++;
    while (this.left.includes(`${OWNER} ${this.claims}`));
    return `${OWNER} ${this.claims}`;
  }

  /** The same release, however often it is asked for. */
  private once(release: () => Promise<void>): () => Promise<void> {
    let released: Promise<void> | undefined;
    return () => {
      released ??= release();
      return released;
    };
  }
}
