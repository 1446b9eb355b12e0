import type { Json } from "../base/json.ts";
import type { Kept } from "../keeper/keeper-client.ts";
import type { OwnedFd } from "../native/fd.ts";

/**
 * Keeps records with file descriptors across the death of the daemon. It has no policy and knows no devices.
 *
 * The daemon writes each change of a VF's record *before* the front-end is answered; the fds are borrowed for the call
 * (a keeper that stores them duplicates them).
 */
export interface Keeper {
  /** @param take what is to be stored as it is now; a keeper that stores nothing does not ask */
  put(key: string, take: () => Kept): Promise<void>;
  /** The caller owns the fds that come back. */
  get(key: string): Promise<{ record: Json; fds: Map<string, OwnedFd> } | undefined>;
  list(): Promise<string[]>;
  delete(key: string): Promise<void>;
}

/** Stands where no keeper is configured: the write points exist, nothing is stored. */
export const nullKeeper: Keeper = {
  async put() {},
  async get() {
    return undefined;
  },
  async list() {
    return [];
  },
  async delete() {},
};
