import { asError } from "../../base/errors.ts";
import type { Logger } from "../../base/log.ts";
import type { Kept } from "../../keeper/keeper-client.ts";
import type { FdStore } from "../../systemd/fd-store.ts";
import { VERSION } from "../../version.ts";
import type { Keeper, KeeperInfo, Stored } from "../keeper.ts";

/** systemd's fd store as the daemon uses it: what it does not take is not kept, and all goes on. */
export class SystemdKeeper implements Keeper, Disposable {
  /** Keys whose records it does not have. */
  private readonly refused = new Set<string>();

  constructor(
    private readonly store: FdStore,
    private readonly log: Logger,
  ) {}

  /** It has no version of its own: what is stored is this program's. */
  info(): KeeperInfo {
    return { name: "the fd store of systemd", version: VERSION, build: "", protects: this.refused.size === 0 };
  }

  async put(key: string, take: () => Kept): Promise<void> {
    const kept = take();
    try {
      await this.store.put(key, () => kept);
      this.refused.delete(key);
    } catch (error) {
      if (!this.refused.has(key)) this.log.error(`${key} is not kept: a restart of this daemon will be seen`, error);
      this.refused.add(key);
      // What it had is of the past.
      await this.drop(key);
    }
  }

  async get(key: string): Promise<Stored | undefined> {
    return await this.store.get(key);
  }

  async list(): Promise<string[]> {
    return await this.store.list();
  }

  async delete(key: string): Promise<void> {
    this.refused.delete(key);
    await this.drop(key);
  }

  async readable(places: readonly (readonly [key: string, fd: number])[]): Promise<(boolean | undefined)[]> {
    return await this.store.readable(places);
  }

  [Symbol.dispose](): void {
    this.store[Symbol.dispose]();
  }

  private async drop(key: string): Promise<void> {
    await this.store.delete(key).catch((error) => this.log.warn(`${key} may still be kept`, asError(error)));
  }
}
