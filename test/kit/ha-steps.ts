import { Deadline } from "../../src/base/deadline.ts";
import { VhostdError } from "../../src/base/errors.ts";
import { Request } from "../../src/vhost-user/messages.ts";
import { FrontendDirtyLog } from "./frontend/dirty-log.ts";
import type { FrontendListener, VhostUserFrontend } from "./frontend/frontend.ts";
import { LonelyGuest } from "./frontend/hang-up.ts";
import type { MemoryRegion } from "./frontend/memory.ts";
import { startLogging, stopLogging } from "./frontend/migration-messages.ts";
import type { HaLab } from "./ha-lab.ts";
import { type BackgroundIo, VerifiedDisk } from "./verified-disk.ts";

/** Guest-physical, far from the memory of the rings. */
const PLUGGED = 2 ** 32;
/** Milliseconds. */
const MEET_TIMEOUT = 20_000;

/** What is done to a running device while its daemon may die. The names are those of `OPERATIONS`. */
export type OperationName = keyof typeof OPERATIONS;

/** There and back again: after both the device runs as before. */
interface Operation {
  forth(guest: SteppedGuest): Promise<void>;
  back(guest: SteppedGuest): Promise<void>;
}

export const OPERATIONS = {
  "stop, start": {
    forth: async (guest) => guest.stop("new"),
    back: async (guest) => guest.start(),
  },
  "stop in the old order, start": {
    forth: async (guest) => guest.stop("old"),
    back: async (guest) => guest.start(),
  },
  "memory plugged, unplugged": {
    forth: async (guest) => guest.plug(),
    back: async (guest) => guest.unplug(),
  },
  "queue disabled, enabled": {
    forth: async ({ frontend }) => void (await frontend.enable(1, false)),
    back: async ({ frontend }) => void (await frontend.enable(1, true)),
  },
  "pages marked, no more": {
    forth: async (guest) => void (await guest.log()),
    back: async ({ frontend }) => stopLogging(frontend),
  },
} as const satisfies Record<string, Operation>;

/** A guest with verified requests under way all the time, and a front-end that does one thing after the other. */
export class SteppedGuest implements Disposable {
  /** Sessions that had to begin anew. */
  reconnects = 0;
  /** Where the rings stand; undefined while they are in use. */
  private bases: number[] | undefined;
  private plugged: MemoryRegion | undefined;
  private lonely: LonelyGuest | undefined;
  private dirtyLog: FrontendDirtyLog | undefined;

  private constructor(
    private readonly listener: FrontendListener,
    private current: VhostUserFrontend,
    private load: BackgroundIo,
    private readonly disk: VerifiedDisk,
  ) {}

  static async start(lab: HaLab, index = 0): Promise<SteppedGuest> {
    const { listener, frontend } = await lab.connect(index);
    await frontend.negotiate();
    await frontend.setupMemory([{ gpa: 0, size: 16 << 20 }]);
    await frontend.startQueues(2);
    // All VFs have one image.
    const disk = new VerifiedDisk(index * 512);
    const load = disk.runOn(frontend.queues[0]!.driver, 3);
    await load.progress(10);
    return new SteppedGuest(listener, frontend, load, disk);
  }

  get frontend(): VhostUserFrontend {
    return this.current;
  }

  /** Requests that were answered since it began to move. */
  get done(): number {
    return this.load.done;
  }

  /** Requests go on to be answered rightly. */
  async progress(): Promise<void> {
    await this.load.progress(10);
  }

  /** Nothing is under way until `move`. @throws what went wrong at any time */
  async rest(): Promise<void> {
    await this.load.stop();
  }

  async move(): Promise<void> {
    this.load = this.disk.runOn(this.current.queues[0]!.driver, 3);
    await this.progress();
  }

  /** All that was written is there. @throws what went wrong at any time */
  async end(): Promise<void> {
    await this.load.stop();
    await this.disk.verifyAll(this.current.queues[0]!.driver);
  }

  async stop(order: "old" | "new"): Promise<void> {
    this.bases = await this.current.stop({ order });
  }

  async start(): Promise<void> {
    // Behind a new connection they are in use already.
    if (this.bases === undefined) return;
    await this.current.resumeQueues(this.bases);
    this.bases = undefined;
  }

  async plug(): Promise<void> {
    // Behind a new connection it is there already.
    if (this.plugged !== undefined) return;
    this.plugged = this.current.memory.add(PLUGGED, 2 << 20);
    const answer = await this.current.addRegion(this.plugged);
    if (answer !== 0n) throw new Error(`memory was refused: ${answer}`);
  }

  async unplug(): Promise<void> {
    if (this.plugged === undefined) return;
    const answer = await this.current.removeRegion(this.plugged);
    if (answer !== 0n) throw new Error(`memory could not be taken: ${answer}`);
    this.current.memory.drop(this.plugged);
    this.plugged = undefined;
  }

  async log(): Promise<FrontendDirtyLog> {
    this.dirtyLog ??= new FrontendDirtyLog(this.current.memory.end);
    await startLogging(this.current, this.dirtyLog);
    return this.dirtyLog;
  }

  /**
   * Does it, whatever becomes of the session: where that ends the guest runs behind a new one afterwards.
   * @returns whether the session went on
   */
  async survive(operation: () => Promise<void>): Promise<boolean> {
    try {
      await operation();
      return true;
    } catch (error) {
      if (!(error instanceof VhostdError && error.code === "connectionLost")) throw error;
    }
    await this.meetNext();
    return false;
  }

  /** Its session has ended, or ends now: the guest runs behind a new one afterwards. */
  async meetNext(): Promise<void> {
    this.hangUp();
    using guest = this.lonely!;
    this.lonely = undefined;
    this.reconnects++;
    this.current = await this.listener.accept();
    await guest.meet(this.current);
    this.bases = undefined;
  }

  /** As meetNext; connections that have ended already are let go of. */
  async meetLiving(): Promise<void> {
    await Deadline.after(MEET_TIMEOUT, "a connection that lives").poll(async () => {
      try {
        await this.meetNext();
        return true;
      } catch (error) {
        if (error instanceof VhostdError && error.code === "connectionLost") return undefined;
        throw error;
      }
    }, 1);
  }

  /** Closes the connection in the middle of everything; `meetNext` is next. */
  hangUp(): void {
    this.lonely ??= LonelyGuest.hangUp(this.current);
  }

  /** Its connection is the one that it has had all the time. @throws VhostdError connectionLost */
  async isHeard(): Promise<void> {
    await this.current.askU64(Request.GET_FEATURES);
    await this.progress();
  }

  [Symbol.dispose](): void {
    this.current[Symbol.dispose]();
    this.listener[Symbol.dispose]();
    this.dirtyLog?.[Symbol.dispose]();
    this.lonely?.[Symbol.dispose]();
  }
}
