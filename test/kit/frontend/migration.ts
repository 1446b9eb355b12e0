import { VhostdError } from "../../../src/base/errors.ts";
import { signalEventfd } from "../../../src/native/sys.ts";
import { LOG_PAGE } from "../../../src/virtio/dirty-log.ts";
import { FrontendDirtyLog } from "./dirty-log.ts";
import type { VhostUserFrontend } from "./frontend.ts";
import { renewEventfds } from "./hang-up.ts";
import { FrontendMemory } from "./memory.ts";
import { type EarlySetup, presetup, startLogging, stopLogging } from "./migration-messages.ts";

/** Bytes that are copied at a time where all memory is. */
const CHUNK = 1 << 20;

/**
 * A VM that moves, without a VM: its guest memory is copied from one place to another while its devices run, as a VMM does,
 * and the front-ends of both places say what QEMU's say. The devices of one VM share memory and log.
 */
export class Migration implements Disposable {
  /** Where each ring goes on, by device. Known after `stop`. */
  bases: readonly (readonly number[])[] = [];
  /** Pages copied after the first pass, in all. */
  copied = 0;
  private readonly memory: FrontendMemory;
  /** At the destination. */
  private readonly arrived = new FrontendMemory();
  private readonly written = new Set<number>();

  private constructor(
    private readonly sources: readonly VhostUserFrontend[],
    readonly log: FrontendDirtyLog,
  ) {
    this.memory = sources[0]!.memory;
    for (const { file } of this.memory.regions) this.arrived.add(file.gpa, file.size);
  }

  /**
   * Has all devices mark what they write, and copies all memory once.
   * @param sources devices of one VM, which run; memory is read of the first one
   */
  static async begin(sources: readonly VhostUserFrontend[]): Promise<Migration> {
    const [first] = sources;
    if (first === undefined) throw new VhostdError("invalid", "a migration needs a device");
    const migration = new Migration(sources, new FrontendDirtyLog(first.memory.end));
    try {
      for (const { memory } of sources) memory.onWrite = (gpa, length) => migration.note(gpa, length);
      await Promise.all(sources.map((source) => startLogging(source, migration.log)));
      migration.copyAll();
      return migration;
    } catch (error) {
      migration[Symbol.dispose]();
      throw error;
    }
  }

  /** Copies what devices and drivers have written since the last pass; after `stop`, for the last time. @returns pages */
  pass(): number {
    const pages = new Set([...this.log.take(), ...this.written]);
    this.written.clear();
    for (const page of pages) this.copy(page * LOG_PAGE, LOG_PAGE);
    this.copied += pages.size;
    return pages.size;
  }

  /** The VM runs on where it was. */
  async cancel(): Promise<void> {
    await Promise.all(this.sources.map(stopLogging));
  }

  /** At the destination, before the VM has stopped: what NVIDIA's QEMU says of each device. */
  async prepare(destinations: readonly VhostUserFrontend[], options: EarlySetup = {}): Promise<void> {
    await Promise.all(
      destinations.map(async (destination, index) => {
        const { queues } = this.sources[index]!;
        const setup = { bases: queues.map(() => 0), ...options };
        destination.memory[Symbol.dispose]();
        destination.memory = this.share();
        await presetup(destination, queues, setup);
      }),
    );
  }

  /**
   * The VM stops at the source.
   * @param order as of VhostUserFrontend.stop
   */
  async stop({ order }: { order: "old" | "new" }): Promise<void> {
    this.bases = await Promise.all(this.sources.map((source) => source.stop({ order })));
  }

  /** Guest-physical addresses of pages that are not at the destination what they are at the source. */
  differences(): number[] {
    const different: number[] = [];
    for (const { file } of this.memory.regions) {
      for (let gpa = file.gpa; gpa < file.gpa + file.size; gpa += LOG_PAGE) {
        const [here, there] = [this.memory.read(gpa, LOG_PAGE), this.arrived.read(gpa, LOG_PAGE)];
        if (Buffer.compare(here, there) !== 0) different.push(gpa);
      }
    }
    return different;
  }

  /**
   * The VM runs at the destination. Requests that were not answered at the source are answered here; the sources have
   * neither memory nor queues then.
   * @param destinations negotiated, in the order of the sources
   */
  async arrive(destinations: readonly VhostUserFrontend[]): Promise<void> {
    // Everything is at hand before the first message, as in a VMM that waits for its VM's state.
    for (const [index, destination] of destinations.entries()) this.move(this.sources[index]!, destination);
    await Promise.all(
      destinations.map(async (destination, index) => {
        await destination.handMemory();
        await destination.resumeQueues(this.bases[index]!);
      }),
    );
  }

  [Symbol.dispose](): void {
    for (const { memory } of this.sources) memory.onWrite = () => {};
    this.log[Symbol.dispose]();
    this.arrived[Symbol.dispose]();
  }

  /** The rings know their memory: it stays the same object, with other files. */
  private move(source: VhostUserFrontend, destination: VhostUserFrontend): void {
    const { memory, queues } = source;
    source.memory = new FrontendMemory();
    source.queues = [];
    memory.onWrite = () => {};
    memory.become(this.share());
    destination.memory[Symbol.dispose]();
    destination.memory = memory;
    destination.queues = queues.map((queue) => renewEventfds(queue, (kick) => signalEventfd(kick.number)));
  }

  private share(): FrontendMemory {
    const memory = new FrontendMemory();
    for (const region of this.arrived.regions) memory.share(region);
    return memory;
  }

  private note(gpa: number, length: number): void {
    for (let page = Math.floor(gpa / LOG_PAGE); page * LOG_PAGE < gpa + length; page++) this.written.add(page);
  }

  private copyAll(): void {
    for (const { file } of this.memory.regions) {
      const end = file.gpa + file.size;
      for (let gpa = file.gpa; gpa < end; gpa += CHUNK) this.copy(gpa, Math.min(CHUNK, end - gpa));
    }
  }

  /** What is 0 takes no memory at the destination, where it is 0 already. */
  private copy(gpa: number, length: number): void {
    const bytes = this.memory.read(gpa, length);
    if (length === LOG_PAGE || bytes.some((byte) => byte !== 0)) this.arrived.write(gpa, bytes);
  }
}
