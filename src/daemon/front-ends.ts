import { setTimeout as pause } from "node:timers/promises";
import { asError } from "../base/errors.ts";
import type { Json } from "../base/json.ts";
import type { Logger } from "../base/log.ts";
import type { OwnedFd } from "../native/fd.ts";
import { Endpoint } from "../vhost-user/endpoint.ts";
import { Session, type SessionEnd } from "../vhost-user/session.ts";
import type { SessionTarget } from "../vhost-user/target.ts";
import { closing } from "./record.ts";
import { startEndpoint, type VfOptions, type VfSurroundings } from "./vf-parts.ts";

const LISTENER = "listener";

export interface FrontEndsOptions {
  readonly place: Pick<VfOptions, "socket" | "mode">;
  readonly around: Pick<VfSurroundings, "deadlines" | "isOurs">;
  readonly log: Logger;
  /** What a session drives. */
  readonly target: SessionTarget;
  /** Whether a front-end of the process with this id is served now. */
  readonly welcomes: (pid: number) => boolean;
  /** A session is over and undone; the next front-end waits for this. */
  readonly onEnd: (end: SessionEnd) => Promise<void>;
  /** A session could not be begun, or `onEnd` has thrown: nobody else undoes what the front-end left. */
  readonly onFailure: (error: Error) => Promise<void>;
}

/** The front-ends of one VF, one after the other. */
export class FrontEnds {
  private current: Session | undefined;
  private serving: Promise<void> = Promise.resolve();
  /** Milliseconds before the next one is taken up. */
  private backoff = 0;
  private readonly endpoint: Endpoint;
  private readonly stopping = new AbortController();

  constructor(private readonly options: FrontEndsOptions) {
    const { place, target, welcomes, log } = options;
    const { isOurs } = options.around;
    this.endpoint = new Endpoint(
      { path: place.socket, mode: place.mode, welcomes, ...(isOurs === undefined ? {} : { isOurs }) },
      (connection) => this.serve(() => new Session(connection, target, { log })),
      log,
    );
  }

  /** The session of the front-end that is connected, or whose end is being undone. */
  get session(): Session | undefined {
    return this.current;
  }

  /**
   * Begins to look for the first one.
   * @param fds that `fds` of an earlier process gave; taken
   * @throws VhostdError socketInUse, socketPath
   */
  start(fds: ReadonlyMap<string, OwnedFd> = new Map()): void {
    startEndpoint(this.endpoint, this.options.place.socket, false, fds.get(LISTENER));
  }

  /** What a later process goes on to listen at, borrowed. */
  get fds(): ReadonlyMap<string, number> {
    const { listenerFd } = this.endpoint;
    return new Map(listenerFd === undefined ? [] : [[LISTENER, listenerFd]]);
  }

  /**
   * Goes on with the one that was connected to an earlier process; resolves when it is heard, or will not be.
   * @param fds of its session; taken
   * @param own as of `start`; taken
   * @param before done before it is heard; where it throws, the session ends with that
   * @throws VhostdError socketInUse, socketPath
   */
  async revive(
    session: Json,
    fds: Map<string, OwnedFd>,
    own: ReadonlyMap<string, OwnedFd>,
    before: () => Promise<void>,
  ): Promise<void> {
    const { place, target, log } = this.options;
    using unused = closing(fds);
    startEndpoint(this.endpoint, place.socket, true, own.get(LISTENER));
    unused.move();
    const heard = Promise.withResolvers<void>();
    const first = async () => {
      try {
        await before();
      } finally {
        heard.resolve();
      }
    };
    this.serve(() => Session.revive(target, session, fds, { log }), first);
    await Promise.race([heard.promise, this.serving]);
  }

  /** Has the record of the VF written anew, after what its session is at. Never rejects. */
  async note(): Promise<void> {
    const { target, log } = this.options;
    const noted = this.current?.checkpoint() ?? target.checkpoint();
    await noted.catch((error) => log.error("a change could not be noted", asError(error)));
  }

  /** One has got to run: the next ones need not wait any more. */
  ranWell(): void {
    this.backoff = 0;
  }

  /** There will be no other one. */
  stop(): void {
    this.stopping.abort();
    this.endpoint[Symbol.dispose]();
  }

  /** As stop; resolves when the session has ended by itself and is undone. */
  async last(): Promise<void> {
    this.stop();
    await this.serving;
  }

  /** As stop; ends the session, and resolves when it is undone. */
  async close(reason: string): Promise<void> {
    this.current?.close(reason);
    await this.last();
  }

  /** As stop; lets go of the session without a word to anybody. */
  async abandon(): Promise<void> {
    this.stopping.abort();
    this.endpoint.abandon();
    await this.current?.abandon();
  }

  private serve(begin: () => Session, before?: () => Promise<void>): void {
    this.serving = this.runSession(begin, before).catch((error: unknown) => this.options.onFailure(asError(error)));
  }

  private async runSession(begin: () => Session, before?: () => Promise<void>): Promise<void> {
    this.current = begin();
    const end = await this.current.run(before);
    this.current = undefined;
    const { firstBackoff, longestBackoff } = this.options.around.deadlines;
    if (end.error !== undefined) this.backoff = Math.min(longestBackoff, Math.max(firstBackoff, this.backoff * 2));
    await this.options.onEnd(end);
    await pause(this.backoff, undefined, { signal: this.stopping.signal }).catch(() => {});
    this.endpoint.markFree();
  }
}
