import { Place } from "./migrate-place.ts";
import { Replay } from "./migrate-script.ts";
import { MigratingVm } from "./migrate-vm.ts";

/** A VM with so many VFs, and two places, between which it goes back and forth. */
export class BackAndForth implements AsyncDisposable {
  private constructor(
    private source: Place,
    private destination: Place,
    private readonly vm: MigratingVm,
    private readonly early: boolean,
  ) {}

  /** @param early the destination is set up before the VM stops */
  static async start(vfs: number, early = false): Promise<BackAndForth> {
    await using undo = new AsyncDisposableStack();
    const frontend = early ? "nvidia-presetup" : "standard";
    const source = undo.use(await Place.start(vfs, frontend));
    const destination = undo.use(await Place.start(vfs, frontend));
    const vm = await MigratingVm.start(source.sockets, await Replay.build(source.directory));
    undo.move();
    return new BackAndForth(source, destination, vm, early);
  }

  /**
   * Moves the VM once. The clock stands still between the stop's last answer and the start's first message, which is the
   * VMM's own time.
   * @param delay of each admin command, milliseconds
   * @returns the daemons' own share of the blackout: without the time in which a software PF was at a command. Milliseconds
   */
  async move(delay: number): Promise<number> {
    const { vm, source, destination } = this;
    await destination.idle();
    await vm.connect(destination.sockets);
    if (this.early) await vm.setUpEarly();
    await vm.startLogging();
    for (const place of [source, destination]) await place.setDelay(delay);
    const stop = await ownShare(source, () => vm.stop());
    vm.move();
    const start = await ownShare(destination, () => vm.resume());
    for (const place of [source, destination]) await place.setDelay(0);
    vm.leave();
    [this.source, this.destination] = [destination, source];
    return stop + start;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.vm[Symbol.dispose]();
    await this.source[Symbol.asyncDispose]();
    await this.destination[Symbol.asyncDispose]();
  }
}

/** @param work answers how long it took. Milliseconds */
async function ownShare(place: Place, work: () => Promise<number>): Promise<number> {
  const before = await place.commandTime();
  const took = await work();
  return took - ((await place.commandTime()) - before);
}
