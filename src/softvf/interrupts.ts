import type { OwnedFd } from "../native/fd.ts";
import { signalEventfd } from "../native/sys.ts";

/** Where the client of a function wants its MSI-X vectors signalled. Owns the eventfds. */
export class InterruptRoutes implements Disposable {
  private readonly eventfds = new Map<number, OwnedFd>();

  /** @param onChange a vector is routed to another fd now, or to none */
  constructor(
    readonly vectors: number,
    private readonly onChange: (vector: number, fd: number | null) => void,
  ) {}

  /** Takes the fd. */
  route(vector: number, eventfd: OwnedFd | undefined): void {
    const before = this.eventfds.get(vector);
    if (eventfd === undefined) this.eventfds.delete(vector);
    else this.eventfds.set(vector, eventfd);
    try {
      if (before !== undefined || eventfd !== undefined) this.onChange(vector, eventfd?.number ?? null);
    } finally {
      before?.[Symbol.dispose]();
    }
  }

  /** Borrowed; null where the vector is not routed. */
  fd(vector: number): number | null {
    return this.eventfds.get(vector)?.number ?? null;
  }

  /** Never blocks, also where a peer's eventfd is full. */
  signal(vector: number): void {
    const eventfd = this.eventfds.get(vector);
    if (eventfd !== undefined) signalEventfd(eventfd.number);
  }

  clear(): void {
    for (const vector of [...this.eventfds.keys()]) this.route(vector, undefined);
  }

  [Symbol.dispose](): void {
    this.clear();
  }
}
