import { writeSync } from "node:fs";
import { isMainThread, parentPort } from "node:worker_threads";

/**
 * Ends this process, with a message, where a check comes to no end: a class that blocks its thread for ever lets no timer
 * of that thread expire, that of the test runner included. A thread of its own watches.
 */
export class Watchdog implements Disposable {
  private constructor(private readonly worker: Worker) {}

  static async start(): Promise<Watchdog> {
    const worker = new Worker(import.meta.url);
    const ready = Promise.withResolvers<void>();
    worker.onmessage = () => ready.resolve();
    worker.onerror = ({ message }) => ready.reject(new Error(`watchdog: ${message}`));
    await ready.promise;
    worker.unref();
    return new Watchdog(worker);
  }

  /** @param what is watched until `rest()` @param limit milliseconds */
  watch(what: string, limit: number): void {
    this.worker.postMessage({ what, limit } satisfies Watched);
  }

  rest(): void {
    this.worker.postMessage(undefined);
  }

  [Symbol.dispose](): void {
    this.worker.terminate();
  }
}

interface Watched {
  readonly what: string;
  readonly limit: number;
}

if (!isMainThread && parentPort !== null) {
  let timer: Timer | undefined;
  parentPort.on("message", (watched: Watched | undefined) => {
    clearTimeout(timer);
    if (watched === undefined) return;
    const { what, limit } = watched;
    timer = setTimeout(() => {
      // Past the other thread, which takes no message.
      writeSync(2, `${what}: the thread is blocked for ${limit} ms or more, the tests end here\n`);
      process.kill(process.pid, "SIGKILL");
    }, limit);
  });
  parentPort.postMessage("ready");
}
