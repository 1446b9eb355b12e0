import { duplicate, type OwnedFd } from "../../native/fd.ts";
import { type Watch, watch } from "../../native/poller.ts";
import { type RelayTarget, relayKick } from "../../native/relay.ts";
import { drainEventfd } from "../../native/sys.ts";

/** Where the kicks of one queue go. */
export interface KickTarget {
  /** Where the relay writes. */
  readonly relay: () => RelayTarget;
  /** Writes without the relay, and without keeping anybody waiting. */
  readonly ring: () => Promise<void>;
}

/**
 * The kicks of a function that are connected: by the relay, which serves all functions, or by this thread, which hears of
 * each kick and has the doorbell rung for it. The second is for a function that could make the relay wait.
 */
export class ConnectedKicks {
  private readonly connections = new Set<Connection>();
  private relayed = true;

  /** A kick that was signalled before counts. The fd is borrowed for the call. The result cuts it, once. */
  connect(kick: number, target: KickTarget): Disposable {
    const connection = new Connection(kick, target, this.relayed);
    this.connections.add(connection);
    return {
      [Symbol.dispose]: () => {
        if (this.connections.delete(connection)) connection[Symbol.dispose]();
      },
    };
  }

  /** None goes by the relay from now on. */
  leaveRelay(): void {
    this.relayed = false;
    for (const connection of this.connections) connection.leaveRelay();
  }

  cut(): void {
    for (const connection of this.connections) connection[Symbol.dispose]();
    this.connections.clear();
  }
}

class Connection implements Disposable {
  private readonly kick: OwnedFd;
  private way: Disposable;

  constructor(
    kick: number,
    private readonly target: KickTarget,
    relayed: boolean,
  ) {
    using undo = new DisposableStack();
    this.kick = undo.use(duplicate(kick));
    const own = this.kick.number;
    this.way = relayed ? relayKick(own, target.relay()) : new WatchedKick(own, target.ring);
    undo.move();
  }

  /** The relay has read nothing: what was signalled at any time before counts. */
  leaveRelay(): void {
    if (this.way instanceof WatchedKick) return;
    this.way[Symbol.dispose]();
    this.way = new WatchedKick(this.kick.number, this.target.ring);
  }

  [Symbol.dispose](): void {
    this.way[Symbol.dispose]();
    this.kick[Symbol.dispose]();
  }
}

/** One doorbell write is under way at most; kicks that come meanwhile make one more. */
class WatchedKick implements Disposable {
  private readonly watch: Watch;

  /** @param kick borrowed until disposal */
  constructor(
    private readonly kick: number,
    private readonly ring: () => Promise<void>,
  ) {
    this.watch = watch(kick, "in", () => void this.pass());
    this.watch.unref();
  }

  private async pass(): Promise<void> {
    try {
      // A counter that stays would be reported again and again.
      drainEventfd(this.kick);
    } catch {
      // No eventfd, of which nobody is served.
      return this[Symbol.dispose]();
    }
    // A doorbell that cannot be reached is one that nobody hears; the driver's own accesses say why.
    await this.ring().catch(() => {});
    this.watch.rearm();
  }

  [Symbol.dispose](): void {
    this.watch[Symbol.dispose]();
  }
}
