import { setImmediate as nextTurn } from "node:timers/promises";

/** One turn of the event loop after the other, for whoever asks: what they do then is not done in one go. */
export class Pace {
  private tail: Promise<unknown> = Promise.resolve();

  /** Resolves in a turn of the event loop of its own. */
  turn(): Promise<void> {
    const turn = this.tail.then(() => nextTurn());
    this.tail = turn;
    return turn;
  }
}

/** Runs commands one after the other, in the order they came, each in a turn of the event loop of its own. */
export class CommandQueue {
  private readonly waiting: (() => Promise<void>)[] = [];
  private busy = false;

  /** @param pace shared by the queues that serve one client */
  constructor(private readonly pace: Pace) {}

  /** @param command never rejects */
  add(command: () => Promise<void>): void {
    this.waiting.push(command);
    if (!this.busy) void this.drive();
  }

  /** Forgets what has not begun, and all that it holds. */
  clear(): void {
    this.waiting.length = 0;
  }

  private async drive(): Promise<void> {
    this.busy = true;
    while (this.waiting.length > 0) {
      await this.pace.turn();
      await this.waiting.shift()?.();
    }
    this.busy = false;
  }
}
