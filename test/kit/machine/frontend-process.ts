import { readFileSync } from "node:fs";
import { Deadline } from "../../../src/base/deadline.ts";
import type { OwnedFd } from "../../../src/native/fd.ts";
import { openFile, pread, pwrite } from "../../../src/native/sys.ts";
import { availIndex, RING, usedIndex } from "../../../src/virtio/split-ring.ts";
import { Child } from "../guest/child.ts";
import { PROGRAM_ENVIRONMENT, programLine } from "./programs.ts";

/** Milliseconds, on a machine that is emulated. */
const START_TIMEOUT = 60_000;
const SIGNAL_TIMEOUT = 10_000;

/** Guest memory of such a front-end, bytes; rings lie in the last region. */
export const FRONTEND_MEMORY = [
  { gpa: 0, size: 4 << 20 },
  { gpa: 2 ** 32, size: 16 << 20 },
] as const;

/** What the program says of itself, so that others can look into its guest's memory. Guest-physical addresses. */
export interface RunningFrontend {
  /** The region of the rings. */
  readonly memory: { readonly fd: number; readonly gpa: number };
  readonly rings: readonly { readonly driver: number; readonly device: number }[];
}

export interface FrontendProcessOptions {
  /** 1 unless said. */
  readonly queues?: number;
  /** Requests under way in each queue; 4 unless said. */
  readonly depth?: number;
  /** Its guest rings the function's doorbells itself, which it was given as host notifiers. */
  readonly doorbells?: boolean;
  /** The same, and once it runs it resets the function again and again. */
  readonly resets?: boolean;
}

/** A front-end with a guest that is busy with its disk, as a process of its own: to be stopped and killed. */
export class FrontendProcess implements AsyncDisposable {
  private constructor(
    private readonly child: Child,
    private readonly told: RunningFrontend,
  ) {}

  /**
   * Resolves when its guest has done its first requests.
   * @param socket of a VF that listens
   * @param log a file for what it writes
   */
  static async start(socket: string, log: string, options: FrontendProcessOptions = {}): Promise<FrontendProcess> {
    const { queues = 1, depth = 4, doorbells = false, resets = false } = options;
    const mode = resets ? ["resets"] : doorbells ? ["doorbells"] : [];
    const words = [socket, `${queues}`, `${depth}`, ...mode];
    const line = [...programLine("frontend-program"), ...words];
    const child = new Child(line, { name: "front-end", log, environment: PROGRAM_ENVIRONMENT });
    try {
      const [, told = ""] = await child.line(/^running (.*)$/m, START_TIMEOUT);
      return new FrontendProcess(child, JSON.parse(told) as RunningFrontend);
    } catch (error) {
      await child.kill();
      throw error;
    }
  }

  get pid(): number {
    return this.child.pid;
  }

  /** SIGSTOP; resolves when none of its threads runs any more. */
  async freeze(): Promise<void> {
    this.child.signal("SIGSTOP");
    const stopped = () => /^State:\s+T/m.test(readFileSync(`/proc/${this.pid}/status`, "utf8")) || undefined;
    await Deadline.after(SIGNAL_TIMEOUT, "stop of the front-end").poll(stopped, 5);
  }

  /** SIGCONT to one whose back-end has hung up: resolves when it has ended, its mappings with it. */
  async thaw(): Promise<void> {
    this.child.signal("SIGCONT");
    await Deadline.after(SIGNAL_TIMEOUT, "end of the front-end").race(this.child.exited);
  }

  /** Waits until it has reset the function that many times more. */
  async resets(more: number): Promise<void> {
    const count = () => this.child.log.match(/^reset /gm)?.length ?? 0;
    const enough = count() + more;
    await Deadline.after(START_TIMEOUT, `${more} resets by the front-end`).poll(
      () => count() >= enough || undefined,
      10,
    );
  }

  /** kill -9. */
  async kill(): Promise<void> {
    await this.child.kill();
  }

  /** The guest's memory, from outside. Works for a process that stands still, too. */
  openMemory(): FrontendGuestMemory {
    const { fd, gpa } = this.told.memory;
    return new FrontendGuestMemory(openFile(`/proc/${this.pid}/fd/${fd}`, "read-write"), gpa, this.told.rings);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.kill();
  }
}

/** The rings of a front-end that stands still, in the place of its guest's driver. */
export class FrontendGuestMemory implements Disposable {
  constructor(
    private readonly file: OwnedFd,
    private readonly gpa: number,
    private readonly rings: RunningFrontend["rings"],
  ) {}

  /** Chains that the device has given back, mod 2^16. */
  used(queue: number): number {
    return usedIndex(this, this.ring(queue));
  }

  /** Chains that were made available, mod 2^16. */
  available(queue: number): number {
    return availIndex(this, this.ring(queue));
  }

  /** Makes one chain more available, whichever was at this place of the ring before. */
  offerAgain(queue: number): void {
    const next = (this.available(queue) + 1) & 0xffff;
    pwrite(this.file.number, Uint8Array.of(next & 0xff, next >> 8), this.ring(queue).driver + RING.index - this.gpa);
  }

  read(gpa: number, length: number): Uint8Array {
    const bytes = new Uint8Array(length);
    const read = pread(this.file.number, bytes, gpa - this.gpa);
    if (read !== length) throw new Error(`read ${read} of ${length} bytes of the guest at 0x${gpa.toString(16)}`);
    return bytes;
  }

  [Symbol.dispose](): void {
    this.file[Symbol.dispose]();
  }

  private ring(queue: number): RunningFrontend["rings"][number] {
    const ring = this.rings[queue];
    if (ring === undefined) throw new Error(`the front-end has ${this.rings.length} queues, none with index ${queue}`);
    return ring;
  }
}
