import { Deadline } from "../../base/deadline.ts";
import { asError, SystemError, VhostdError } from "../../base/errors.ts";
import type { Logger } from "../../base/log.ts";
import { KeeperClient, type Kept, type Storing } from "../../keeper/keeper-client.ts";
import type { Delivered, Delivery } from "../../vhost-user/target.ts";
import type { Keeper, KeeperInfo, Stored } from "../keeper.ts";
import { Freshness, isStale } from "./freshness.ts";

/** The record with the page that says whether the others are up to date. */
const FRESHNESS_KEY = "daemon";
/** Milliseconds for a keeper that is there to serve this daemon: it may still be busy with the one before. */
const CONNECT_TIMEOUT = 10_000;
/** Milliseconds between two tries to find one. */
const RETRY_INTERVAL = 200;
/** Nobody can listen at a path that is too long. */
const NOBODY_LISTENS: readonly number[] = [2 /* ENOENT */, 36 /* ENAMETOOLONG */, 111 /* ECONNREFUSED */];

interface Connected {
  readonly client: KeeperClient;
  readonly freshness: Freshness;
}

/**
 * The keeper as the daemon uses it: it may be away, come and go. While it is, nothing is stored and all goes on; when it
 * comes all is stored again.
 */
export class KeeperLink implements Keeper, Disposable {
  private connected: Connected | undefined;
  private writeAll: () => Promise<void> = async () => {};
  private timer: ReturnType<typeof setTimeout> | undefined;
  private closed = false;
  private wasHere = false;
  /** What is connected has not been given all of what there is: of each that has come, until it has. */
  private writes = 0;
  /** Keys whose records the keeper does not take. */
  private readonly refused = new Set<string>();
  /** By key: the last that was asked of its record. What becomes of those before says nothing. */
  private readonly latest = new Map<string, symbol>();

  private constructor(
    private readonly path: string,
    private readonly log: Logger,
  ) {}

  /**
   * Looks for a keeper at the path of its socket.
   * @throws VhostdError where one is there that does not serve this daemon: going on without it would leave what it has in
   *   use for ever
   */
  static async open(path: string, log: Logger): Promise<KeeperLink> {
    const link = new KeeperLink(path, log);
    const client = await link.find();
    if (client === undefined) {
      log.info(`there is no keeper at ${path}: a restart of this daemon is not hidden from its VMMs`);
      link.lookLater();
    } else await link.begin(client, true);
    return link;
  }

  info(): KeeperInfo | undefined {
    if (this.connected === undefined) return undefined;
    const { version, build } = this.connected.client.identity;
    return { name: "vfe-vhostd-ha", version, build, protects: this.refused.size === 0 && this.writes === 0 };
  }

  onReturn(writeAll: () => Promise<void>): void {
    this.writeAll = writeAll;
  }

  async reach(deadline: Deadline): Promise<void> {
    if (!this.wasHere) return;
    const hasAll = () => (this.connected !== undefined && this.writes === 0) || undefined;
    await deadline.poll(hasAll, RETRY_INTERVAL / 4).catch(() => {});
  }

  /** Resolves when it is stored, or the keeper is known not to have it. */
  async put(key: string, take: () => Kept): Promise<void> {
    const { connected } = this;
    if (connected === undefined) return;
    const kept = take();
    const turn = this.turnOf(key);
    await this.unlessAway(connected, async ({ client }) => {
      try {
        await client.put(key, () => kept);
        this.wasTaken(key, turn);
      } catch (error) {
        if (client.ended !== undefined) throw error;
        await this.wasRefused(client, key, turn, error);
      }
    });
  }

  async deliver(key: string, storing: Storing | undefined, { take, reply }: Delivery): Promise<Delivered> {
    const { connected } = this;
    if (connected === undefined) return { kind: "undone" };
    const { client } = connected;
    const turn = storing && this.turnOf(key);
    try {
      const sent = await client.deliver(key, 0, take, reply, storing);
      if (turn !== undefined) this.wasTaken(key, turn);
      return { kind: "taken", sent };
    } catch (error) {
      if (client.ended !== undefined) {
        this.wentAway(connected, client.ended);
        return { kind: "unknown" };
      }
      if (turn !== undefined && isRefusedRecord(error)) {
        await this.unlessAway(connected, () => this.wasRefused(client, key, turn, error));
      } else if (!isCode(error, "notFound")) throw error;
      return { kind: "undone" };
    }
  }

  private turnOf(key: string): symbol {
    const turn = Symbol();
    this.latest.set(key, turn);
    return turn;
  }

  private wasTaken(key: string, turn: symbol): void {
    if (this.latest.get(key) === turn) this.refused.delete(key);
  }

  private async wasRefused(client: KeeperClient, key: string, turn: symbol, error: unknown): Promise<void> {
    // What was asked since then stores it, deletes it, or is refused, too.
    if (this.latest.get(key) !== turn) return;
    if (!this.refused.has(key)) this.log.error(`${key} is not kept: a restart of this daemon will be seen`, error);
    this.refused.add(key);
    // What it had is of the past.
    await client.delete(key);
  }

  async get(key: string): Promise<Stored | undefined> {
    return await this.connected?.client.get(key);
  }

  /** @throws VhostdError connectionLost where it was here and is away: what it has is not known */
  async list(): Promise<string[]> {
    const { connected } = this;
    if (connected === undefined && this.wasHere) {
      throw new VhostdError("connectionLost", `the keeper at ${this.path} is away`);
    }
    const keys = await connected?.client.list();
    return keys?.filter((key) => key !== FRESHNESS_KEY) ?? [];
  }

  async delete(key: string): Promise<void> {
    this.refused.delete(key);
    this.latest.delete(key);
    if (this.connected !== undefined) await this.unlessAway(this.connected, ({ client }) => client.delete(key));
  }

  async readable(places: readonly (readonly [key: string, fd: number])[]): Promise<(boolean | undefined)[]> {
    return (await this.connected?.client.readable(places)) ?? places.map(() => undefined);
  }

  /** What it has stays with the keeper. */
  [Symbol.dispose](): void {
    this.closed = true;
    clearTimeout(this.timer);
    this.connected?.client[Symbol.dispose]();
    this.connected?.freshness[Symbol.dispose]();
    this.connected = undefined;
  }

  /** @returns undefined where nobody is there @throws VhostdError, SystemError */
  private async find(): Promise<KeeperClient | undefined> {
    try {
      return await KeeperClient.connect(this.path, Deadline.after(CONNECT_TIMEOUT, `being served by ${this.path}`));
    } catch (error) {
      if (error instanceof SystemError && NOBODY_LISTENS.includes(error.errno)) return undefined;
      const cause = asError(error);
      const code = cause instanceof VhostdError ? cause.number : "connectionLost";
      throw new VhostdError(code, `the keeper at ${this.path} does not serve this daemon: ${cause.message}`, {
        fix: "it serves one daemon at a time, of root or of its own user: see what it writes (journalctl -u vfe-vhostd-ha)",
        cause,
      });
    }
  }

  /** @param inherits what it has is of a daemon before this one, and worth something where it is up to date */
  private async begin(client: KeeperClient, inherits: boolean): Promise<Connected | undefined> {
    using undo = new DisposableStack();
    undo.use(client);
    if (!inherits || !(await isUpToDate(client))) {
      const keys = await client.list();
      for (const key of keys) await client.delete(key);
      if (keys.length > 0) this.log.warn(`the keeper had ${keys.length} records of the past, which were dropped`);
    }
    const freshness = undo.use(new Freshness());
    // Until it has been given all: a daemon that comes next is not to take some of it for that.
    if (!inherits) freshness.end();
    await client.put(FRESHNESS_KEY, () => ({ record: { pid: process.pid }, fds: new Map([["page", freshness.fd]]) }));
    if (this.closed) return undefined;
    undo.move();
    const connected = { client, freshness };
    this.connected = connected;
    this.wasHere = true;
    this.refused.clear();
    this.latest.clear();
    const { version } = client.identity;
    this.log.info(`the keeper at ${this.path}, version ${version}, keeps what this daemon has`);
    void client.lost.then((reason) => this.wentAway(connected, reason));
    return connected;
  }

  /** @throws what `work` does, unless the keeper has gone */
  private async unlessAway(connected: Connected, work: (connected: Connected) => Promise<void>): Promise<void> {
    try {
      await work(connected);
    } catch (error) {
      // The page says so before anything goes on.
      if (connected.client.ended !== undefined) return this.wentAway(connected, connected.client.ended);
      throw error;
    }
  }

  private wentAway(connected: Connected, reason: Error): void {
    if (this.connected !== connected) return;
    connected.freshness.end();
    connected.freshness[Symbol.dispose]();
    this.connected = undefined;
    this.log.warn("the keeper has gone: until it is back a restart of this daemon is not hidden from its VMMs", reason);
    this.lookLater();
  }

  private lookLater(): void {
    clearTimeout(this.timer);
    if (this.closed) return;
    this.timer = setTimeout(() => void this.look(), RETRY_INTERVAL);
  }

  private async look(): Promise<void> {
    try {
      const client = await this.find();
      if (client === undefined) return this.lookLater();
      this.writes++;
      try {
        const connected = await this.begin(client, false);
        await this.writeAll();
        if (connected !== undefined && this.connected === connected) connected.freshness.begin();
      } finally {
        this.writes--;
      }
    } catch (error) {
      this.log.warn("the keeper does not take what this daemon has", asError(error));
      const { connected } = this;
      if (connected === undefined) return this.lookLater();
      // It has some of it only: a daemon that comes next is not to take that for all.
      this.wentAway(connected, asError(error));
      connected.client[Symbol.dispose]();
    }
  }
}

/** By the keeper, or by the kernel, which did not take the fds: nothing of the delivery was done. */
function isRefusedRecord(error: unknown): boolean {
  return isCode(error, "keeperStore") || error instanceof SystemError;
}

function isCode(error: unknown, code: VhostdError["code"]): boolean {
  return error instanceof VhostdError && error.code === code;
}

async function isUpToDate(client: KeeperClient): Promise<boolean> {
  const stored = await client.get(FRESHNESS_KEY);
  if (stored === undefined) return false;
  using fds = new DisposableStack();
  for (const fd of stored.fds.values()) fds.use(fd);
  const page = stored.fds.get("page");
  return page !== undefined && !isStale(page);
}
