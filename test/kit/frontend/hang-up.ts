import type { OwnedFd } from "../../../src/native/fd.ts";
import { eventfd, signalEventfd } from "../../../src/native/sys.ts";
import { usedIndex } from "../../../src/virtio/split-ring.ts";
import type { FrontendQueue, VhostUserFrontend } from "./frontend.ts";
import { FrontendMemory } from "./memory.ts";

/** A guest whose VMM has lost its back-end: memory and rings as they are, and nobody who would be told of kicks. */
export class LonelyGuest implements Disposable {
  private constructor(
    private memory: FrontendMemory,
    private queues: FrontendQueue[],
    /** Where QEMU asks the next back-end to go on: the used index that was in memory after the hang-up. */
    readonly bases: readonly number[],
  ) {}

  /** The front-end closes its connection in the middle of everything. It has neither memory nor queues then. */
  static hangUp(frontend: VhostUserFrontend): LonelyGuest {
    const { memory, queues } = frontend;
    frontend.memory = new FrontendMemory();
    frontend.queues = [];
    frontend[Symbol.dispose]();
    const bases = queues.map(({ driver: { ring } }) => usedIndex(memory, ring));
    const deaf = queues.map((queue) => renewEventfds(queue, () => {}));
    return new LonelyGuest(memory, deaf, bases);
  }

  /** The same guest behind a new connection, with new eventfds. It is the front-end's from now on. */
  async meet(frontend: VhostUserFrontend, bases: readonly number[] = this.bases): Promise<void> {
    frontend.memory[Symbol.dispose]();
    frontend.memory = this.memory;
    frontend.queues = this.queues.map((queue) => renewEventfds(queue, (kick) => signalEventfd(kick.number)));
    this.memory = new FrontendMemory();
    this.queues = [];
    await frontend.negotiate();
    await frontend.setupMemory([]);
    await frontend.resumeQueues(bases);
  }

  [Symbol.dispose](): void {
    for (const { kick, driver } of this.queues.splice(0)) {
      driver[Symbol.dispose]();
      kick[Symbol.dispose]();
    }
    this.memory[Symbol.dispose]();
  }
}

/** The same ring with other eventfds. The old ones are closed. */
export function renewEventfds({ index, kick, driver }: FrontendQueue, ring: (kick: OwnedFd) => void): FrontendQueue {
  kick[Symbol.dispose]();
  const renewed = { index, kick: eventfd(), driver };
  driver.rewire(() => ring(renewed.kick));
  return renewed;
}
