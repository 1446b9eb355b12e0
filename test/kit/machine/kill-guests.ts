import { Request } from "../../../src/vhost-user/messages.ts";
import type { VhostUserFrontend } from "../frontend/frontend.ts";
import { NetGuest } from "../net/net-guest.ts";
import type { FrameStream } from "../net/streams.ts";
import { BackgroundIo, VerifiedDisk } from "../verified-disk.ts";
import { run } from "./disk-guest.ts";
import { HostNotifiers } from "./host-notifier.ts";
import type { MachineLab } from "./lab.ts";

/** Blocks of each queue's part of a disk, and requests under way. */
const BLOCKS = 24;
const DEPTH = 2;
/** Milliseconds between two requests or frames: the machine's processors are to be the daemon's, too, which starts. */
const INTERVAL = 5;

/** A guest that is to notice nothing, whatever becomes of the daemon. Indices are mod 2^16. */
export interface BusyGuest extends Disposable {
  readonly frontends: readonly VhostUserFrontend[];
  /** Resolves when so much more was done, and found right. @throws what went wrong */
  progress(some: number): Promise<void>;
  /** All that is under way ends, nothing more begins. @throws what went wrong, what was lost */
  finish(): Promise<void>;
  /** Of each queue, by front-end: what the guest has had back. */
  readonly returned: readonly (readonly number[])[];
}

export interface BusyDiskOptions {
  readonly queues: number;
  readonly memory: readonly { readonly gpa: number; readonly size: number }[];
  /** Its doorbells are mapped, and no kick eventfd is used. */
  readonly doorbells?: boolean;
}

/** Verified requests on all queues of a disk. */
export class BusyDisk implements BusyGuest {
  private readonly loads: readonly BackgroundIo[];
  private readonly disks: readonly VerifiedDisk[];

  private constructor(
    readonly frontend: VhostUserFrontend,
    private readonly notifiers: HostNotifiers | undefined,
  ) {
    this.disks = frontend.queues.map(({ index }) => new VerifiedDisk(index * BLOCKS, BLOCKS));
    this.loads = this.begin();
  }

  static async start(lab: MachineLab, address: string, options: BusyDiskOptions): Promise<BusyDisk> {
    const { queues, memory, doorbells = false } = options;
    using undo = new DisposableStack();
    const frontend = undo.use(lab.dial(address));
    await run(frontend, queues, memory);
    const notifiers = doorbells ? await HostNotifiers.use(frontend) : undefined;
    undo.move();
    return new BusyDisk(frontend, notifiers);
  }

  get frontends(): readonly VhostUserFrontend[] {
    return [this.frontend];
  }

  get returned(): readonly (readonly number[])[] {
    return [this.frontend.queues.map(({ driver }) => driver.returned & 0xffff)];
  }

  async progress(some: number): Promise<void> {
    await Promise.all(this.loads.map((load) => load.progress(some)));
  }

  /** As a VMM does that stops its VM: requests under way may end, and no further one begins. */
  pause(): void {
    for (const load of this.loads) load.pause();
  }

  resume(): void {
    for (const load of this.loads) load.resume();
  }

  async finish(): Promise<void> {
    await Promise.all(this.loads.map((load) => load.stop()));
    const { queues } = this.frontend;
    await Promise.all(this.disks.map((disk, index) => disk.verifyAll(queues[index]!.driver)));
  }

  /** Whatever becomes of what is under way: its VF is gone. */
  async abandon(): Promise<void> {
    this[Symbol.dispose]();
    await Promise.all(this.loads.map((load) => load.abandon()));
  }

  [Symbol.dispose](): void {
    this.notifiers?.[Symbol.dispose]();
    this.frontend[Symbol.dispose]();
  }

  private begin(): BackgroundIo[] {
    return this.disks.map((disk, index) => {
      const step = async () => {
        await Bun.sleep(INTERVAL);
        await disk.step(this.frontend.queues[index]!.driver);
      };
      return new BackgroundIo(step, DEPTH);
    });
  }
}

/** Two network guests that send each other verified frames. */
export class BusyNetwork implements BusyGuest {
  private readonly streams: readonly FrameStream[];

  private constructor(
    private readonly one: NetGuest,
    private readonly two: NetGuest,
  ) {
    this.streams = [one.stream(0, two, { interval: INTERVAL }), two.stream(0, one, { interval: INTERVAL })];
  }

  static async start(lab: MachineLab, [one, two]: readonly [string, string]): Promise<BusyNetwork> {
    using undo = new DisposableStack();
    const guests = [];
    for (const address of [one, two]) {
      guests.push(undo.use(await NetGuest.boot(lab.dialNet(address), { size: 64 })));
      await lab.reaches(address, "running");
    }
    undo.move();
    return new BusyNetwork(guests[0]!, guests[1]!);
  }

  get frontends(): readonly VhostUserFrontend[] {
    return [this.one.frontend, this.two.frontend];
  }

  get returned(): readonly (readonly number[])[] {
    return [this.one.usedIndices, this.two.usedIndices];
  }

  async progress(some: number): Promise<void> {
    await Promise.all(this.streams.map((stream) => stream.progress(some)));
  }

  async finish(): Promise<void> {
    for (const stream of this.streams) {
      // Frames that waited in QEMU's hub for receive buffers, of which a kick that is not relayed yet tells, may come behind
      // later ones, which find the buffers.
      const { lost } = await stream.stop();
      if (lost > 0) throw new Error(`of ${stream.sent} frames, ${lost} were lost`);
    }
    for (const guest of [this.one, this.two]) await guest.checkBuffers();
  }

  [Symbol.dispose](): void {
    this.one[Symbol.dispose]();
    this.two[Symbol.dispose]();
  }
}

/** The sessions go on: each back-end answers on the connection that there was from the start. */
export async function sessionsGoOn(guests: readonly BusyGuest[]): Promise<void> {
  for (const { frontends } of guests) for (const frontend of frontends) await frontend.askU64(Request.GET_FEATURES);
}
