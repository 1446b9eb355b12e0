import { Deadline } from "../../src/base/deadline.ts";
import type { OwnedFd } from "../../src/native/fd.ts";
import { eventfd, signalEventfd } from "../../src/native/sys.ts";
import { Request } from "../../src/vhost-user/messages.ts";
import { readRequest, SECTOR } from "../kit/blk-requests.ts";
import { DriverQueue } from "../kit/driver-queue.ts";
import { DriverRing } from "../kit/driver-ring.ts";
import { FrontendDirtyLog } from "../kit/frontend/dirty-log.ts";
import { VhostUserFrontend } from "../kit/frontend/frontend.ts";
import { FrontendMemory } from "../kit/frontend/memory.ts";
import { presetup, startLogging } from "../kit/frontend/migration-messages.ts";
import { type Completion, type Replay, ScriptedFrontend } from "./migrate-script.ts";

const LOW = { gpa: 0, size: 0xa0000 };
const HIGH = { gpa: 0x1_0000_0000, size: 16 << 20 };
const RING = 128;
const BUFFERS = 1 << 16;
/** Of a request, milliseconds. */
const TIMEOUT = 15_000;
/** Where the index of a used ring is. */
const USED_INDEX = 2;

/** One device of the VM: its only queue, and who serves it. */
interface Device {
  readonly frontend: VhostUserFrontend;
  readonly driver: DriverQueue;
  readonly kick: OwnedFd;
  /** Not the driver's own, which JavaScript waits on. */
  readonly call: OwnedFd;
}

/**
 * A VM that is none, with block devices of one queue each, which moves from place to place: at both it says what QEMU says.
 * Its memory comes along as it is, because here the copying of it is nobody's concern.
 */
export class MigratingVm implements Disposable {
  private readonly memory = new FrontendMemory([LOW, HIGH]);
  private readonly log = new FrontendDirtyLog(this.memory.end);
  private devices: Device[] = [];
  /** At the place that it moves to: connected, and nothing runs. */
  private ahead: VhostUserFrontend[] = [];
  /** At the place that it has left: connected, and nothing runs. */
  private behind: VhostUserFrontend[] = [];
  /** Requests that each device has served. */
  private served = 0;

  private constructor(private readonly replay: Replay) {}

  /** Connects to each of the sockets and runs there. */
  static async start(sockets: readonly string[], replay: Replay): Promise<MigratingVm> {
    const vm = new MigratingVm(replay);
    await vm.connect(sockets);
    const span = DriverRing.span(RING, BUFFERS);
    const { memory } = vm;
    const drivers = vm.ahead.map(({ features }, device) => {
      const base = HIGH.gpa + device * span;
      return new DriverQueue(new DriverRing({ memory, base, size: RING, features, bufferSpace: BUFFERS }), () => {});
    });
    vm.arrive(drivers);
    await vm.resume();
    return vm;
  }

  /** Front-ends at the place that it will move to say who they are, as they do when the VMM there is started. */
  async connect(sockets: readonly string[]): Promise<void> {
    this.ahead = await Promise.all(
      sockets.map(async (socket) => {
        const frontend = VhostUserFrontend.connect(socket);
        frontend.replies = "as QEMU";
        await frontend.negotiate();
        frontend.memory = this.memory;
        return frontend;
      }),
    );
  }

  /** The early set-up there. */
  async setUpEarly(): Promise<void> {
    const setUp = (frontend: VhostUserFrontend, index: number) => presetup(frontend, [ring(this.devices[index]!)]);
    await Promise.all(this.ahead.map(setUp));
  }

  /** All devices mark what they write, and write something. */
  async startLogging(): Promise<void> {
    await Promise.all(this.devices.map(({ frontend }) => startLogging(frontend, this.log)));
    this.submit();
    for (const { kick } of this.devices) signalEventfd(kick.number);
    const deadline = Deadline.after(TIMEOUT, "a read of each device");
    for (const device of this.devices) await deadline.poll(() => take(device) || undefined, 1);
  }

  /** From the first message of the stop to the answer of the last device. @returns milliseconds */
  stop(): Promise<number> {
    return this.say((script) => script.stop({ order: "old" }));
  }

  /** What there is at the destination before the VM's state comes: eventfds. */
  move(): void {
    this.behind = this.devices.map(({ frontend }) => frontend);
    this.arrive(this.devices.map(({ driver }) => driver));
  }

  /**
   * From the first message of the start to the last device's first completed request. A device may serve it before its PF has
   * answered that it runs: the start is waited for, too.
   * @returns milliseconds
   */
  async resume(): Promise<number> {
    const base = this.served;
    this.submit();
    const completions = this.devices.map(({ driver, call }) => {
      return { offset: driver.ring.device + USED_INDEX - HIGH.gpa, index: this.served, call: call.number };
    });
    const took = await this.say(async (script, device) => {
      // QEMU has a disk's features acknowledged twice: before the memory, and with the rings.
      await script.setFeatures();
      await script.handMemory();
      await script.startRings([ring(device)], [base]);
      await script.ask(Request.GET_STATUS);
    }, completions);
    if (!this.devices.every(take)) throw new Error("a request was not served");
    return took;
  }

  /** The front-ends of the place that it was at end. */
  leave(): void {
    for (const frontend of this.behind) hangUp(frontend);
    this.behind = [];
  }

  [Symbol.dispose](): void {
    this.leave();
    for (const frontend of this.ahead) hangUp(frontend);
    for (const device of this.devices) {
      hangUp(device.frontend);
      closeEventfds(device);
      device.driver[Symbol.dispose]();
    }
    this.log[Symbol.dispose]();
    this.memory[Symbol.dispose]();
  }

  /** The front-ends ahead serve the devices from now on. */
  private arrive(drivers: readonly DriverQueue[]): void {
    for (const device of this.devices) closeEventfds(device);
    this.devices = this.ahead.map((frontend, index) => {
      const device = { frontend, driver: drivers[index]!, kick: eventfd(), call: eventfd() };
      frontend.queues = [{ index: 0, kick: device.kick, driver: device.driver }];
      return device;
    });
    this.ahead = [];
  }

  /** A read of each device, which nobody is told of. */
  private submit(): void {
    const { readable, writable } = readRequest(0, SECTOR);
    for (const { driver } of this.devices) driver.ring.submit(readable, writable);
    this.served = (this.served + 1) & 0xffff;
  }

  private async say(
    sequence: (script: ScriptedFrontend, device: Device) => Promise<unknown>,
    completions: readonly Completion[] = [],
  ): Promise<number> {
    using scripts = new DisposableStack();
    const frontends: ScriptedFrontend[] = [];
    for (const device of this.devices) {
      const script = scripts.use(new ScriptedFrontend(device.frontend, [this.served]));
      await sequence(script, device);
      frontends.push(script);
    }
    return await this.replay.run(this.memory.regions[1]!.file.file.number, frontends, completions);
  }
}

function ring({ driver, kick, call }: Device) {
  return { index: 0, kick, driver: { ring: driver.ring, call } };
}

/** @returns whether the device has given back the one request that it has */
function take({ driver }: Device): boolean {
  const completed = driver.ring.completions();
  if (completed.some(({ written }) => written.at(-1)?.[0] !== 0)) throw new Error("a read failed");
  return completed.length === 1;
}

function closeEventfds({ kick, call }: Device): void {
  kick[Symbol.dispose]();
  call[Symbol.dispose]();
}

/** Memory and queues are the VM's. */
function hangUp(frontend: VhostUserFrontend): void {
  frontend.memory = new FrontendMemory();
  frontend.queues = [];
  frontend[Symbol.dispose]();
}
