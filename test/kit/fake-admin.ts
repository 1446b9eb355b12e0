import { Deadline } from "../../src/base/deadline.ts";
import { SystemError } from "../../src/base/errors.ts";
import { duplicate, type OwnedFd } from "../../src/native/fd.ts";
import { signalEventfd, truncate } from "../../src/native/sys.ts";
import { DmaDomain } from "../../src/pci/dma-domain.ts";
import type { DeviceClass } from "../../src/plugin.ts";
import type { AdminQueue, AdminQueueTimeouts } from "../../src/virtio/admin/admin-queue.ts";
import { type AdminDiscovery, openAdmin } from "../../src/virtio/admin/open-admin.ts";
import {
  ADMIN_HEADER,
  AdminClass,
  DirtyPagesCommand,
  type DirtyPagesCommandName,
  MigrationCommand,
  type MigrationCommandName,
  VDEV_DATA,
} from "../../src/virtio/admin/vendor.ts";
import type { VendorAdmin } from "../../src/virtio/admin/vendor-admin.ts";
import { FeatureBit, featureBits } from "../../src/virtio/features.ts";
import { VirtioPciDevice } from "../../src/virtio/pci-device.ts";
import { type FakeChain, FakeDeviceRing, FakeDma } from "./fake-dma.ts";
import { FakeFunction, type FakeFunctionOptions } from "./fake-function.ts";
import { answerOfTracking } from "./fake-tracking.ts";
import { FakeVf, honestAnswer } from "./fake-vf.ts";

const PF_FEATURES = featureBits(FeatureBit.accessPlatform, FeatureBit.adminVq);
const TIMEOUT = 5000;
/** The size of the file is sealed. */
const EPERM = 1;

export type FakeCommandName = MigrationCommandName | DirtyPagesCommandName;

/** A command as the device has taken it off the ring. */
export interface FakeCommand {
  /** Its first descriptor. */
  readonly head: number;
  readonly class: number;
  readonly command: number;
  /** undefined for a command of another class, or one that there is not. */
  readonly name: FakeCommandName | undefined;
  readonly vdevId: number;
  readonly data: Uint8Array;
  readonly payload: Uint8Array;
  /** Bytes of the result that there is room for. */
  readonly room: number;
}

/** `silence`: never. A result may be shorter or longer than the room. */
export type FakeAnswer = { readonly status: number; readonly result?: Uint8Array } | "silence";

export interface FakeAdminOptions extends FakeFunctionOptions {
  /** 2. */
  readonly vfs?: number;
  readonly queue?: number;
  readonly timeouts?: AdminQueueTimeouts;
  /** Milliseconds between two tries of a command; 1. */
  readonly retryInterval?: number;
}

/**
 * A PF made of registers and JavaScript: reads the admin queue's memory as a device does, by the fd that was mapped.
 * It is an honest device until `answer` is replaced, or it is made to lie on the ring itself.
 */
export class FakeAdmin implements AsyncDisposable {
  readonly fn: FakeFunction;
  readonly vfs: readonly FakeVf[];
  /** Everything taken off the ring, oldest first. */
  readonly seen: FakeCommand[] = [];
  /** What the device answers, at once or later. */
  answer: (command: FakeCommand) => FakeAnswer | Promise<FakeAnswer> = (command) => this.honest(command);
  /** Whether completions raise the queue's vector. */
  interrupts = true;
  readonly domain: DmaDomain;
  readonly queue: number;
  /** Memory as it reaches it. */
  readonly dma = new FakeDma();
  private readonly ring: FakeDeviceRing;
  private readonly routes = new Map<number, OwnedFd>();
  private opened: VendorAdmin | undefined;

  constructor(private readonly options: FakeAdminOptions = {}) {
    const { vfs = 2, queue = 0, features = PF_FEATURES, queues = queue + 1, queueSize = 2048 } = options;
    this.queue = queue;
    this.fn = new FakeFunction({ ...options, features, queues, queueSize });
    this.fn.onRing = (rung) => {
      if (rung === queue) this.serve();
    };
    // As a function does it, which goes on signalling when the process dies that routed.
    this.fn.interrupts.route = async (vector, eventfd) => {
      this.routes.get(vector)?.[Symbol.dispose]();
      if (eventfd === null) this.routes.delete(vector);
      else this.routes.set(vector, duplicate(eventfd));
    };
    this.vfs = Array.from({ length: vfs }, () => new FakeVf());
    this.ring = new FakeDeviceRing(this.dma, () => this.fn.queues[queue]!);
    this.fn.onReset = () => this.ring.restart();
    this.domain = new DmaDomain(this.dma);
  }

  /** What the driver finds out about it. */
  async discover(
    deviceClass: Pick<DeviceClass, "configSpace" | "adminQueue"> = { configSpace: {}, adminQueue: () => this.queue },
    deadline = Deadline.after(TIMEOUT, "the discovery"),
  ): Promise<AdminDiscovery> {
    const device = await VirtioPciDevice.probe(this.fn, deadline);
    const { timeouts, retryInterval = 1 } = this.options;
    const found = await openAdmin(device, this.domain, deviceClass, deadline, { ...timeouts, retry: retryInterval });
    if (found.kind === "vendor") this.opened = found.admin;
    return found;
  }

  /** The driver's side, working. */
  async open(): Promise<VendorAdmin> {
    const found = await this.discover();
    if (found.kind === "none") throw new Error(found.reason);
    return found.admin;
  }

  /** What a device does that keeps to the specification and has these VFs. */
  honest(command: FakeCommand): FakeAnswer {
    return command.class === AdminClass.dirtyPages
      ? answerOfTracking(this.vfs, command, this.dma)
      : honestAnswer(this.vfs, command);
  }

  /** A VF writes these pages: it marks them where it was told to, if it was. */
  write(vdevId: number, ...pages: number[]): void {
    this.vfs[vdevId - 1]!.tracking?.write(pages, this.dma);
  }

  /** What is mapped for the PF, beside its admin queue. */
  get maps(): number {
    return this.dma.files.length - 1;
  }

  /** Commands of one name that were taken, of one VF where said. */
  commands(name: FakeCommandName, vdevId?: number): FakeCommand[] {
    return this.seen.filter((one) => one.name === name && (vdevId === undefined || one.vdevId === vdevId));
  }

  /** Gives a chain back, whether or not there is one. */
  complete(id: number, length = 1): void {
    this.ring.complete(id, length);
    this.interrupt();
  }

  /** The used index alone; the driver is told. */
  setUsedIndex(value: number): void {
    this.ring.setUsedIndex(value);
    this.interrupt();
  }

  /**
   * Makes the file of the queue's memory this short, bytes, as a hostile process would that has it.
   * @returns whether that was possible
   */
  shrinkMemory(size: number): boolean {
    try {
      truncate(this.dma.files[0]!.number, size);
    } catch (error) {
      if (error instanceof SystemError && error.errno === EPERM) return false;
      throw error;
    }
    return true;
  }

  /** Takes and answers whatever is there. */
  serve(): void {
    if (this.fn.queues[this.queue]!.enable === 0) return;
    for (let chain = this.ring.take(); chain !== undefined; chain = this.ring.take()) void this.execute(chain);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.opened?.queue[Symbol.asyncDispose]();
    this.domain.abandon();
    this.dma[Symbol.dispose]();
    for (const fd of this.routes.values()) fd[Symbol.dispose]();
  }

  private async execute({ head, readable, writable }: FakeChain): Promise<void> {
    const [header = new Uint8Array(2), data = new Uint8Array(0), payload = new Uint8Array(0)] = readable.map(
      ({ address, length }) => this.dma.read(address, length),
    );
    const status = writable.at(-1);
    const result = writable.length > 1 ? writable[0] : undefined;
    const number = ADMIN_HEADER.read(header);
    const command: FakeCommand = {
      head,
      ...number,
      name: nameOf(number),
      vdevId: data.length < VDEV_DATA.size ? 0 : VDEV_DATA.read(data).vdevId,
      data,
      payload,
      room: result?.length ?? 0,
    };
    this.seen.push(command);
    const answer = await this.answer(command);
    // The queue may be gone meanwhile.
    if (answer === "silence" || this.fn.queues[this.queue]!.enable === 0 || this.dma.files.length === 0) return;
    if (result !== undefined) {
      this.dma.write(result.address, (answer.result ?? new Uint8Array(0)).subarray(0, result.length));
    }
    if (status !== undefined) this.dma.write(status.address, Uint8Array.of(answer.status));
    this.complete(head, 1 + (result?.length ?? 0));
  }

  private interrupt(): void {
    const eventfd = this.routes.get(this.fn.queues[this.queue]!.vector);
    if (this.interrupts && eventfd !== undefined) signalEventfd(eventfd.number);
  }
}

function nameOf(number: { readonly class: number; readonly command: number }): FakeCommandName | undefined {
  const known = { [AdminClass.migration]: MigrationCommand, [AdminClass.dirtyPages]: DirtyPagesCommand }[number.class];
  const names = Object.entries(known ?? {}) as [FakeCommandName, number][];
  return names.find(([, value]) => value === number.command)?.[0];
}

/** Why the queue is dead, or undefined. */
export function deathOf({ queue }: { readonly queue: AdminQueue }): string | undefined {
  const { state } = queue;
  return state.kind === "dead" ? state.reason : undefined;
}
