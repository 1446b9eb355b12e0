import type { Backend } from "./net-backends.ts";
import { Testpmd, type TestpmdPlace } from "./net-testpmd.ts";

/** Milliseconds. */
const WARM_UP = 500;
const MEASURED = 2_000;
/** Frames that are lost are missing for the rest of a run. One in which none is left is repeated. */
const ATTEMPTS = 3;
/** Entries of each ring. */
const RING = 256;
/** Of 64 frames each, that are sent into each device when a run begins: a ring never has to hold all that it has room for. */
const BURSTS = 3;

/** A front-end of two devices which sends all that it receives from one into the other, so that frames go round. */
export class NetLoop implements AsyncDisposable {
  private constructor(
    private readonly backend: Backend,
    private readonly start: () => Promise<Testpmd>,
    private frontend: Testpmd,
  ) {}

  /** @param name unique among those in the directory */
  static async start(name: string, backend: Backend, { directory, cpu, otherCpu }: TestpmdPlace): Promise<NetLoop> {
    const devices = backend.sockets.map(
      (socket, index) =>
        `net_virtio_user${index},path=${socket},queues=1,queue_size=${RING},mac=02:00:00:00:01:0${index}`,
    );
    // The CPUs change places: the back-end has its own to itself.
    const start = () => Testpmd.start({ name, directory, cpu: otherCpu, otherCpu: cpu, devices });
    return new NetLoop(backend, start, await start());
  }

  /**
   * One measurement.
   * @param size of the frames, bytes
   * @returns frames per second that came out of the devices, both together
   * @throws Error where no frame is left in one direction, each time
   */
  async run(size: number): Promise<number> {
    for (let attempt = 0; attempt < ATTEMPTS; attempt++) {
      if (attempt > 0) await this.restart();
      const received = await this.attempt(size);
      if (received.every((frames) => frames > 0)) return received.reduce((sum, frames) => sum + frames, 0);
    }
    throw new Error(`no frames go round through ${this.backend.name}`);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.frontend[Symbol.asyncDispose]();
  }

  private async restart(): Promise<void> {
    console.error(`no frames go round through ${this.backend.name}: once more, with a new front-end`);
    await this.frontend[Symbol.asyncDispose]();
    this.frontend = await this.start();
  }

  /** @returns what came out of each device, frames per second */
  private async attempt(size: number): Promise<number[]> {
    await this.frontend.command(`set txpkts ${size}`);
    await this.backend.resume();
    await this.frontend.command(`start tx_first ${BURSTS}`);
    await Bun.sleep(WARM_UP);
    // It says what happened since it was asked last.
    await this.frontend.command("show port stats all");
    await Bun.sleep(MEASURED);
    const statistics = await this.frontend.command("show port stats all");
    await this.frontend.command("stop");
    await this.backend.pause();
    const rates = [...statistics.matchAll(/Rx-pps: +(\d+)/g)].map((match) => Number(match[1]));
    if (rates.length !== this.backend.sockets.length) throw new Error(`testpmd has no such statistics:\n${statistics}`);
    return rates;
  }
}
