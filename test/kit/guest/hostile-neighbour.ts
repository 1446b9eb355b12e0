import fc from "fast-check";
import { SystemError } from "../../../src/base/errors.ts";
import type { OwnedFd } from "../../../src/native/fd.ts";
import { connectUnix } from "../../../src/native/sys.ts";
import { VhostUserFrontend } from "../frontend/frontend.ts";
import { FdPool } from "../fuzz/fd-pool.ts";
import { runHostileFrontend } from "../fuzz/hostile-frontend.ts";
import { type FuzzedSession, fuzzedSessions, type Offered } from "../fuzz/vhost-user.ts";
import { VerifiedDisk } from "../verified-disk.ts";

/** Milliseconds between two tries to reach a daemon that is not there. */
const RETRY_INTERVAL = 20;
const SHAPE = { oneBadOf: 300, length: 500, running: 40 };
/** Made at a time. */
const SESSIONS = 20;

/** A front-end that sends nonsense to a VF of its own, session after session, whatever becomes of the daemon meanwhile. */
export class HostileNeighbour implements AsyncDisposable {
  /** Handled by the daemon for certain. */
  private messages = 0;
  private ending = false;
  private readonly pool = new FdPool();
  private readonly running: Promise<void>;

  private constructor(
    private readonly socket: string,
    private readonly offered: Offered,
    private seed: number,
  ) {
    this.running = this.run();
    // Whoever stops it is told.
    this.running.catch(() => {});
  }

  /** @param socket at which the daemon listens for the front-end of a block device with so many queues */
  static async start(socket: string, queues: number, seed: number): Promise<HostileNeighbour> {
    const { features, protocolFeatures } = await behave(socket);
    return new HostileNeighbour(socket, { features, protocolFeatures, queues }, seed);
  }

  /** Its VF is as good as new afterwards. @returns how many messages were handled @throws Error where it hangs, or is not */
  async stop(): Promise<number> {
    this.ending = true;
    await this.running;
    await behave(this.socket);
    return this.messages;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.ending = true;
    await this.running.catch(() => {});
    this.pool[Symbol.dispose]();
  }

  private async run(): Promise<void> {
    while (!this.ending) {
      const sessions = fc.sample(fuzzedSessions(this.offered, SHAPE), { seed: this.seed++, numRuns: SESSIONS });
      for (const session of sessions) if (!this.ending) await this.play(session);
    }
  }

  private async play(session: FuzzedSession): Promise<void> {
    const connection = tryConnect(this.socket);
    if (connection === undefined) await Bun.sleep(RETRY_INTERVAL);
    else this.messages += await runHostileFrontend(connection, session, this.pool);
  }
}

/** A front-end that behaves is offered the same each time, and served. */
async function behave(socket: string): Promise<Pick<Offered, "features" | "protocolFeatures">> {
  using frontend = VhostUserFrontend.connect(socket);
  await frontend.negotiate();
  await frontend.setupMemory([{ gpa: 0, size: 4 << 20 }]);
  await frontend.startQueues(1, { size: 64 });
  await new VerifiedDisk().steps(frontend.queues[0]!.driver, 20);
  return { features: frontend.features, protocolFeatures: frontend.protocolFeatures };
}

function tryConnect(path: string): OwnedFd | undefined {
  try {
    return connectUnix(path);
  } catch (error) {
    if (error instanceof SystemError) return undefined;
    throw error;
  }
}
