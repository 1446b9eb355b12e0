import { Request } from "../../src/vhost-user/messages.ts";
import { VhostUserFrontend } from "../kit/frontend/frontend.ts";
import { InstalledMachine } from "./installed.ts";

/** Milliseconds. */
const TIMEOUT = 30_000;
const MEMORY = 2 << 20;
const RING = { size: 64, bufferSpace: 64 << 10 };
/** What the daemon says when none waits any more. */
const ALL_TAKEN_UP = / (\d+) of (\d+) VFs of an earlier process go on$/m;

/** A daemon with VFs that run, each behind a front-end of its own, which dies and is followed by another one. */
export class BusyMachine implements AsyncDisposable {
  private readonly frontends: VhostUserFrontend[] = [];

  private constructor(private readonly machine: InstalledMachine) {}

  static async start(vfs: number): Promise<BusyMachine> {
    await using undo = new AsyncDisposableStack();
    const machine = undo.use(await InstalledMachine.start(vfs, { keeper: true, queues: 1 }));
    const busy = new BusyMachine(machine);
    undo.defer(() => busy.hangUp());
    await Promise.all(Array.from({ length: vfs }, (_, vf) => busy.connect(vf)));
    undo.move();
    return busy;
  }

  private async connect(vf: number): Promise<void> {
    await this.machine.addVf(vf, "server");
    const frontend = VhostUserFrontend.connect(this.machine.socket(vf));
    this.frontends.push(frontend);
    await frontend.negotiate();
    await frontend.setupMemory([{ gpa: 0, size: MEMORY }]);
    await frontend.startQueues(1, RING);
  }

  /** @returns milliseconds from the daemon's death to another one that has taken up all VFs */
  async adoptAll(): Promise<number> {
    const begin = await this.kill();
    await this.takenUp();
    return performance.now() - begin;
  }

  /** @returns as adoptAll, to the answer of a request that a front-end has sent meanwhile */
  async answerOne(): Promise<number> {
    const begin = await this.kill();
    const frontend = this.frontends[Math.floor(Math.random() * this.frontends.length)]!;
    await frontend.ask(Request.GET_FEATURES);
    const took = performance.now() - begin;
    await this.takenUp();
    return took;
  }

  /** @returns when it was killed; another one has just been started */
  private async kill(): Promise<number> {
    const begin = performance.now();
    await this.machine.daemon.kill();
    this.machine.startDaemon();
    return begin;
  }

  private async takenUp(): Promise<void> {
    const [, taken, all] = await this.machine.daemon.line(ALL_TAKEN_UP, TIMEOUT);
    const vfs = `${this.frontends.length}`;
    if (taken !== vfs || all !== vfs) throw new Error(`${taken} of ${all} VFs were taken up, there were ${vfs}`);
  }

  private hangUp(): void {
    for (const frontend of this.frontends) frontend[Symbol.dispose]();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.hangUp();
    await this.machine[Symbol.asyncDispose]();
  }
}
