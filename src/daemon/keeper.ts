import type { Deadline } from "../base/deadline.ts";
import type { Json } from "../base/json.ts";
import type { Kept, Storing } from "../keeper/keeper-client.ts";
import type { OwnedFd } from "../native/fd.ts";
import type { Delivered, Delivery } from "../vhost-user/target.ts";

export type { Storing } from "../keeper/keeper-client.ts";

/** What was kept of one thing. The fds are whose who asked for it. */
export interface Stored {
  readonly record: Json;
  readonly fds: Map<string, OwnedFd>;
}

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
  get(key: string): Promise<Stored | undefined>;
  list(): Promise<string[]>;
  delete(key: string): Promise<void>;
  /**
   * Whether something waits to be read from sockets of stored records, by key and place of the fd; undefined where nobody
   * can say. Left out by keepers that cannot.
   */
  readable?(places: readonly (readonly [key: string, fd: number])[]): Promise<(boolean | undefined)[]>;
  /**
   * Answers a message in the place of this process, which might die in the midst of it: `take` bytes are taken out of the first
   * fd of the record, a stream socket, and the reply is sent on it. Left out by keepers that cannot.
   * @param storing what is to be stored before
   */
  deliver?(key: string, storing: Storing | undefined, delivery: Delivery): Promise<Delivered>;
  /** What people are told of it; undefined while it is away. Left out by those that nobody is told of. */
  info?(): KeeperInfo | undefined;
  /** This process ends: one that was here before and is away is waited for, until the deadline. Never rejects. */
  reach?(deadline: Deadline): Promise<void>;
  /** It was away, and has nothing of before: all is to be written again. Left out by those that never are. */
  onReturn?(writeAll: () => Promise<void>): void;
}

export interface KeeperInfo {
  readonly name: string;
  readonly version: string;
  readonly build: string;
  /** It has all that there is: another daemon would go on with it. */
  readonly protects: boolean;
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
