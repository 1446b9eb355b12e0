import { VhostdError } from "../../src/base/errors.ts";
import type { Json } from "../../src/base/json.ts";
import type { Keeper } from "../../src/daemon/keeper.ts";
import type { Kept } from "../../src/keeper/keeper-client.ts";
import { duplicate, type OwnedFd } from "../../src/native/fd.ts";

interface Entry {
  record: string;
  fds: Map<string, OwnedFd>;
}

/**
 * A keeper in this process: stores records as JSON text and duplicates of their fds, as the real one does in another.
 */
export class MemoryKeeper implements Keeper, Disposable {
  private readonly entries = new Map<string, Entry>();
  /** Records written so far. */
  writes = 0;
  /** Keys that begin so cannot be stored. */
  refused: string | undefined;

  get keys(): string[] {
    return [...this.entries.keys()];
  }

  /** @throws VhostdError keeperStore where the key is refused */
  async put(key: string, take: () => Kept): Promise<void> {
    if (this.refused !== undefined && key.startsWith(this.refused)) {
      throw new VhostdError("keeperStore", `the keeper does not store ${key}`);
    }
    const { record, fds } = take();
    const kept = new Map([...fds].map(([name, fd]) => [name, duplicate(fd)] as const));
    this.drop(key);
    this.entries.set(key, { record: JSON.stringify(record), fds: kept });
    this.writes++;
  }

  async get(key: string): Promise<{ record: Json; fds: Map<string, OwnedFd> } | undefined> {
    const entry = this.entries.get(key);
    if (entry === undefined) return undefined;
    return {
      record: JSON.parse(entry.record),
      fds: new Map([...entry.fds].map(([name, fd]) => [name, fd.dup()] as const)),
    };
  }

  async list(): Promise<string[]> {
    return this.keys;
  }

  async delete(key: string): Promise<void> {
    this.drop(key);
  }

  [Symbol.dispose](): void {
    for (const key of [...this.entries.keys()]) this.drop(key);
  }

  private drop(key: string): void {
    for (const fd of this.entries.get(key)?.fds.values() ?? []) fd[Symbol.dispose]();
    this.entries.delete(key);
  }
}
