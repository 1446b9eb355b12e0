import { Deadline } from "../../../src/base/deadline.ts";
import type { Json } from "../../../src/base/json.ts";
import { duplicate, type OwnedFd } from "../../../src/native/fd.ts";
import { eventfd } from "../../../src/native/sys.ts";
import type { PciFunction, RegisterSpace } from "../../../src/pci/function.ts";
import type { DeviceClass } from "../../../src/plugin.ts";
import type { AdminQueue } from "../../../src/virtio/admin/admin-queue.ts";
import { VendorAdmin } from "../../../src/virtio/admin/vendor-admin.ts";
import { DataPath } from "../../../src/virtio/data-path.ts";
import { parseDataPathRecord } from "../../../src/virtio/data-path-record.ts";
import { type DeviceState, disabledQueues } from "../../../src/virtio/device-state.ts";
import type { DeviceFailure } from "../../../src/virtio/device-watch.ts";
import { featureBits, Status } from "../../../src/virtio/features.ts";
import type { MoverFactory } from "../../../src/virtio/mover.ts";
import { RegistersMover } from "../../../src/virtio/movers/registers.ts";
import { VendorMover } from "../../../src/virtio/movers/vendor.ts";
import { PciCommand, PciConfig } from "../../../src/virtio/registers.ts";
import { FakeAdmin } from "../../kit/fake-admin.ts";
import { fakeClass } from "../../kit/fake-class.ts";
import { FakeControl } from "../../kit/fake-control.ts";
import { FakeFunction } from "../../kit/fake-function.ts";
import { FakeRings, wantedState } from "./states.ts";
import { advance, disposeLater, with_ } from "./vendor-lab.ts";

/** Processes that die after any access to a device, and those that take their place. */

const soon = (ms = 3000) => Deadline.after(ms, "the test");
const QUEUES = 2;

/** One process: it dies right after so many accesses to the device, the last of which is carried out. */
export class Life {
  readonly died = Promise.withResolvers<"died">();
  /** Accesses made so far. */
  accesses = 0;
  private last = Infinity;
  private readonly burial = Promise.withResolvers<never>();

  constructor() {
    this.burial.promise.catch(() => {});
  }

  get hasDied(): boolean {
    return this.accesses >= this.last;
  }

  /** From now on so many. */
  endsAfter(accesses: number): void {
    this.last = this.accesses + accesses;
  }

  /** What it was waiting for fails, so that nothing of it is left in the test's own process. */
  bury(): void {
    this.burial.reject(new Error("the process has died"));
  }

  access<T>(work: () => Promise<T>): Promise<T> {
    if (this.hasDied) return this.burial.promise;
    this.accesses++;
    const done = work();
    if (this.accesses < this.last) return done;
    void done.catch(() => {}).then(() => this.died.resolve("died"));
    return this.burial.promise;
  }
}

function never<T>(): Promise<T> {
  return new Promise(() => {});
}

/** The function as one process reaches it. */
function reached(fn: FakeFunction, life: Life): PciFunction {
  const space = (inner: RegisterSpace): RegisterSpace => ({
    size: inner.size,
    read: (offset, width) => life.access(() => inner.read(offset, width)),
    write: (offset, width, value) => life.access(() => inner.write(offset, width, value)),
    readBytes: (offset, length) => life.access(() => inner.readBytes(offset, length)),
  });
  return {
    address: fn.address,
    config: space(fn.config),
    region: (bar) => space(fn.region(bar)),
    doorbell: (bar, offset) => {
      const inner = fn.doorbell(bar, offset);
      const { takeKick } = inner;
      return {
        ...inner,
        ring: (value) => life.access(() => inner.ring(value)),
        ...(takeKick === undefined ? {} : { takeKick: (kick) => life.access(() => takeKick(kick)) }),
      };
    },
    interrupts: {
      count: fn.interrupts.count,
      route: (vector, fd) => life.access(() => fn.interrupts.route(vector, fd)),
    },
    lost: fn.lost,
    reset: () => life.access(() => fn.reset()),
    snapshot: () => fn.snapshot(),
    abandon: () => {},
    [Symbol.asyncDispose]: async () => {},
  };
}

/** The admin queue as one process reaches it. What it left in flight is answered. */
export function reachedAdmin(queue: AdminQueue, life: Life): VendorAdmin {
  const submit: AdminQueue["submit"] = (command, deadline) => life.access(() => queue.submit(command, deadline));
  const own = new Proxy(queue, {
    get: (target, name) => {
      if (name === "submit") return submit;
      const value: unknown = Reflect.get(target, name);
      return typeof value === "function" ? value.bind(target) : value;
    },
  });
  return new VendorAdmin(own, 1);
}

/** What a keeper keeps. */
interface Kept {
  readonly data: Json;
  readonly fds: ReadonlyMap<string, OwnedFd>;
}

/** A VF, its guest, and the processes that have it one after the other. */
export class KillLab implements AsyncDisposable {
  life = new Life();
  path!: DataPath;
  readonly rings = new FakeRings();
  readonly eventfds: ReadonlyMap<number, { readonly kick: number; readonly call: number }>;
  /** How far each queue has got, as its guest knows. */
  readonly done: number[] = Array.from({ length: QUEUES }, () => 0);
  private kept: Kept | undefined;
  private readonly owned: OwnedFd[] = [];

  private constructor(
    readonly fn: FakeFunction,
    readonly deviceClass: DeviceClass,
    readonly pf: FakeAdmin | undefined,
    private readonly queue: AdminQueue | undefined,
    readonly control: FakeControl | undefined,
  ) {
    const fd = () => {
      const one = eventfd();
      this.owned.push(one);
      return one.number;
    };
    this.eventfds = new Map(this.done.map((_, queue) => [queue, { kick: fd(), call: fd() }]));
  }

  /** Its PF moves it, with a state that takes two commands. */
  static async vendor(members: Partial<DeviceClass> = {}): Promise<KillLab> {
    const pf = new FakeAdmin();
    disposeLater(pf);
    const { queue } = await pf.open();
    const fn = new FakeFunction({ queues: QUEUES, features: featureBits(6) });
    pf.vfs[0]!.fn = fn;
    const stateFields = () => [{ type: 4, bytes: new Uint8Array(20_000) }];
    return await KillLab.open(new KillLab(fn, fakeClass({ stateFields, ...members }), pf, queue, undefined));
  }

  /** The same of a function that waits on kicks itself. */
  static async direct(): Promise<KillLab> {
    const lab = await KillLab.vendor();
    lab.fn.takesKicks = true;
    return lab;
  }

  /** Nobody does. */
  static async registers(members: Partial<DeviceClass> = {}): Promise<KillLab> {
    const fn = new FakeFunction({ queues: QUEUES + 1, features: featureBits(6) });
    const control = members.control === undefined ? undefined : new FakeControl(fn, QUEUES);
    const lab = new KillLab(fn, fakeClass(members), undefined, undefined, control);
    return await KillLab.open(lab);
  }

  /** What a session asks for, as the guest's memory is now. */
  wanted(): DeviceState {
    const state = wantedState(QUEUES);
    const queues = state.queues.map((queue) => {
      const at = this.done[queue.index]!;
      return { ...queue, lastAvail: at, lastUsed: at };
    });
    return { ...state, queues };
  }

  /** Where the guest's rings begin. */
  beginAt(index: number): void {
    for (const queue of this.done.keys()) this.setDone(queue, index);
  }

  /** A device that may run does something; one that its registers stopped only where it is kicked. */
  work(): void {
    if (!this.mayRun || (this.pf === undefined && this.fn.connected.size === 0)) return;
    for (const queue of this.done.keys()) {
      if (!this.isUsed(queue)) continue;
      const next = (this.done[queue]! + 3) & 0xffff;
      const { pf } = this;
      if (pf === undefined) this.setDone(queue, next);
      else {
        const vf = pf.vfs[0]!;
        const taken = vf.state!.inFlight.find((one) => one.queue === queue)?.heads.length ?? 0;
        advance({ vf, rings: this.rings }, queue, next + taken, next);
        this.done[queue] = next;
      }
    }
  }

  /** The device keeps these buffers. */
  keep(queue: number, heads: readonly number[]): void {
    const vf = this.pf!.vfs[0]!;
    with_(vf, { inFlight: [{ queue, heads }] });
    advance({ vf, rings: this.rings }, queue, this.done[queue]! + heads.length, this.done[queue]!);
  }

  get mayRun(): boolean {
    if (this.pf !== undefined) return this.pf.vfs[0]!.status === "running";
    const isMaster = (this.fn.configBytes[PciConfig.command]! & PciCommand.busMaster) !== 0;
    return (this.fn.status & Status.driverOk) !== 0 && isMaster;
  }

  /** Writes the record, which takes a moment. A process that has died writes nothing. */
  checkpoint = async (): Promise<void> => {
    const { life } = this;
    const { data, fds } = this.path.snapshot();
    const kept = {
      data: JSON.parse(JSON.stringify(data)),
      fds: new Map([...fds].map(([name, fd]) => [name, duplicate(fd)])),
    };
    await Bun.sleep(1);
    if (life.hasDied) {
      for (const fd of kept.fds.values()) fd[Symbol.dispose]();
      return await never();
    }
    this.forget();
    this.kept = kept;
  };

  /** Another process takes its place, with the record that there is. @param time for the take-up, milliseconds */
  async succeed(held = false, time = 3000) {
    this.work();
    this.die();
    this.life = new Life();
    const { data, fds } = this.kept!;
    const own = new Map([...fds].map(([name, fd]) => [name, fd.dup()]));
    const fn = reached(this.fn, this.life);
    this.path = DataPath.revive(fn, data, own, () => this.deviceClass, this.mover());
    this.path.onConfigChange(() => this.changes++);
    this.path.onNotice((text) => this.notices.push(text));
    this.path.onFailure((failure) => this.failures.push(failure));
    const taken = await this.path.takeUp(this.eventfds, soon(time), { held });
    this.work();
    return taken;
  }

  /** The eventfd of the record that tells of configuration changes, borrowed. */
  get interrupt(): number {
    return this.kept!.fds.get("config-interrupt")!.number;
  }

  /** The process dies, and lets go of all that is its own. */
  die(): void {
    this.life.endsAfter(0);
    this.path.abandon();
  }

  /** What matters of device and data path, but for where the rings are. */
  get outcome() {
    const { mover, queues } = parseDataPathRecord(this.path.snapshot().data);
    const vf = this.pf?.vfs[0];
    const isSetUp = this.fn.status !== 0;
    return {
      kind: mover.kind,
      disabled: mover.kind === "reset" ? [] : [...disabledQueues(mover.state)],
      queues,
      internal: vf?.status,
      mayRun: this.mayRun,
      status: this.fn.status,
      used: isSetUp ? [...this.done.keys()].map((queue) => this.isUsed(queue)) : [],
      inFlight: isSetUp ? vf?.state?.inFlight : [],
      connected: [...this.fn.connected].sort(),
      routes: [...this.fn.routes.keys()].sort(),
      told: this.control?.seen.at(-1),
    };
  }

  /** Where the device would go on. */
  get indices(): readonly number[] {
    if (this.pf === undefined) return this.done;
    const { state } = this.pf.vfs[0]!;
    return [...this.done.keys()].map((queue) => state!.indices.find(({ index }) => index === queue)!.lastUsed);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.path.abandon();
    this.control?.[Symbol.dispose]();
    this.forget();
    for (const fd of this.owned) fd[Symbol.dispose]();
  }

  private static async open(lab: KillLab): Promise<KillLab> {
    disposeLater(lab);
    lab.path = await DataPath.open(reached(lab.fn, lab.life), () => lab.deviceClass, soon(), lab.mover());
    if (lab.control !== undefined) await lab.path.openControl(lab.control.domain, "own", {});
    lab.fn.onReset = () => {
      lab.control?.ring.restart();
      lab.resets++;
    };
    await lab.checkpoint();
    return lab;
  }

  /** Of the device, since it was opened. */
  resets = 0;

  /** What the processes that took a place have said. */
  changes = 0;
  readonly notices: string[] = [];
  readonly failures: DeviceFailure[] = [];

  private mover(): MoverFactory {
    const { queue, life } = this;
    if (queue === undefined) return (host, snapshot) => new RegistersMover(host, snapshot);
    const vf = { admin: reachedAdmin(queue, life), vdevId: 1 };
    return (host, snapshot) => new VendorMover(host, vf, snapshot);
  }

  private isUsed(queue: number): boolean {
    const vf = this.pf?.vfs[0];
    if (vf !== undefined) return vf.state?.queues.find(({ index }) => index === queue)?.enable === 1;
    const told = this.control?.seen.at(-1);
    return told === undefined ? this.fn.queues[queue]!.enable === 1 : told.includes(queue);
  }

  private setDone(queue: number, index: number): void {
    this.done[queue] = index;
    this.rings.set(queue, { available: index, used: index });
  }

  private forget(): void {
    for (const fd of this.kept?.fds.values() ?? []) fd[Symbol.dispose]();
    this.kept = undefined;
  }
}
