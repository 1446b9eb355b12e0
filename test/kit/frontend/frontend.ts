import { Deadline } from "../../../src/base/deadline.ts";
import { VhostdError } from "../../../src/base/errors.ts";
import type { OwnedFd } from "../../../src/native/fd.ts";
import { watch } from "../../../src/native/poller.ts";
import {
  accept,
  connectUnix,
  eventfd,
  listenUnix,
  shutDown,
  signalEventfd,
  socketPair,
} from "../../../src/native/sys.ts";
import {
  CONFIG,
  FLAG_NEED_REPLY,
  MEM_TABLE,
  MEMORY_REGION,
  ProtocolFeature,
  Request,
  SINGLE_REGION_PADDING,
  SINGLE_REGION_SIZE,
  U64,
  VRING_ADDR,
  VRING_ADDR_LOG,
  VRING_NO_FD,
  VRING_STATE,
} from "../../../src/vhost-user/messages.ts";
import { FeatureBit, featureBits, hasFeature, Status } from "../../../src/virtio/features.ts";
import { DriverQueue } from "../driver-queue.ts";
import { DriverRing } from "../driver-ring.ts";
import { BackendRequests, WireChannel } from "./channel.ts";
import { FrontendMemory, type MemoryRegion } from "./memory.ts";

/** Acknowledged while a migration runs; the rest of what is offered is taken at once. */
const NOT_FOR_US = featureBits(FeatureBit.vhostLogAll);
const RUNNING = Status.acknowledge | Status.driver | Status.featuresOk | Status.driverOk;
/** A back-end that has not answered by then never will. Milliseconds. */
const REPLY_TIMEOUT = 30_000;
const NOTHING = new Uint8Array();

/** The commands that QEMU 7.2 wants a reply to. */
const QEMU_WAITS_FOR: ReadonlySet<number> = new Set([
  Request.SET_MEM_TABLE,
  Request.SET_BACKEND_REQ_FD,
  Request.ADD_MEM_REG,
  Request.REM_MEM_REG,
]);

export interface NegotiateOptions {
  /** Of what is offered, only this. */
  readonly features?: bigint;
  readonly protocolFeatures?: bigint;
}

export interface QueueOptions {
  /** Entries; 128 unless said. */
  readonly size?: number;
  /** Bytes of buffers behind each ring; 1 MiB unless said. */
  readonly bufferSpace?: number;
  /** Where the rings begin: they have been in use before. 0 unless said. */
  readonly firstIndex?: number;
}

/** One queue as guest and VMM see it together. */
export interface FrontendQueue {
  readonly index: number;
  readonly kick: OwnedFd;
  /** Requests as promises; its `call` is the ring's call eventfd. */
  readonly driver: DriverQueue;
}

/** Where the ring of a queue is. */
export interface RingSetup {
  readonly index: number;
  readonly driver: { readonly ring: Pick<DriverRing, "size" | "desc" | "driver" | "device"> };
}

/** What is told of a queue: where its ring is, and its eventfds. */
export interface QueueSetup extends RingSetup {
  readonly kick: OwnedFd;
  readonly driver: RingSetup["driver"] & { readonly call: OwnedFd };
}

export interface AddressOptions {
  /** Writes to the used ring are to be logged. */
  readonly log?: boolean;
}

/**
 * A vhost-user front-end for tests and benchmarks: every message by itself, good or bad, and the sequences that real
 * front-ends send.
 */
export class VhostUserFrontend implements Disposable {
  readonly channel: WireChannel;
  /** Acknowledged. */
  features = 0n;
  protocolFeatures = 0n;
  memory = new FrontendMemory();
  queues: FrontendQueue[] = [];
  backendRequests: BackendRequests | undefined;
  /** Which commands ask for a reply where REPLY_ACK is negotiated. */
  replies: "all" | "as QEMU" = "all";

  /** Takes ownership of a connected socket. */
  constructor(fd: OwnedFd) {
    this.channel = new WireChannel(fd);
  }

  /** Connects to a back-end that listens. */
  static connect(path: string): VhostUserFrontend {
    return new VhostUserFrontend(connectUnix(path));
  }

  /** Has a number of the protocol been negotiated? */
  has(protocolFeature: number): boolean {
    return hasFeature(this.protocolFeatures, protocolFeature);
  }

  /** Sends a request and waits for nothing. */
  async send(request: number, payload: Uint8Array = NOTHING, fds: readonly number[] = []): Promise<void> {
    await this.channel.send(request, payload, fds);
  }

  /** Sends a request that has an answer of its own. @throws VhostdError connectionLost where none comes */
  async ask(request: number, payload: Uint8Array = NOTHING, fds: readonly number[] = []): Promise<Uint8Array> {
    await this.send(request, payload, fds);
    return await this.answer(request);
  }

  async askU64(request: number): Promise<bigint> {
    return U64.read(await this.ask(request)).value;
  }

  /** With REPLY_ACK: waits for the reply. @returns 0n where the back-end accepted it (or was not asked) */
  async command(request: number, payload: Uint8Array = NOTHING, fds: readonly number[] = []): Promise<bigint> {
    if (this.replies === "all" || QEMU_WAITS_FOR.has(request)) return await this.answered(request, payload, fds);
    await this.send(request, payload, fds);
    return 0n;
  }

  /** A command that wants a reply wherever one can be wanted. @returns as `command` */
  async answered(request: number, payload: Uint8Array = NOTHING, fds: readonly number[] = []): Promise<bigint> {
    if (!this.has(ProtocolFeature.REPLY_ACK)) {
      await this.send(request, payload, fds);
      return 0n;
    }
    await this.channel.send(request, payload, fds, FLAG_NEED_REPLY);
    return U64.read(await this.answer(request)).value;
  }

  /** Resolves when the back-end has closed the connection; answers that come before are dropped. */
  async hungUp(): Promise<void> {
    const deadline = Deadline.after(REPLY_TIMEOUT, "hang-up of the back-end");
    try {
      while ((await deadline.race(this.channel.receive())) !== undefined);
    } catch (error) {
      if (!(error instanceof VhostdError) || error.code === "timedOut") throw error;
    }
  }

  /** Connect as QEMU's block front-end does: 1 15 16 17 36 21 3 1. */
  async negotiate({ features = ~0n, protocolFeatures = ~0n }: NegotiateOptions = {}): Promise<void> {
    const offered = await this.askU64(Request.GET_FEATURES);
    const offeredProtocol = await this.askU64(Request.GET_PROTOCOL_FEATURES);
    this.protocolFeatures = offeredProtocol & protocolFeatures;
    await this.send(Request.SET_PROTOCOL_FEATURES, u64(this.protocolFeatures));
    if (this.has(ProtocolFeature.MQ)) await this.ask(Request.GET_QUEUE_NUM);
    if (this.has(ProtocolFeature.CONFIGURE_MEM_SLOTS)) await this.ask(Request.GET_MAX_MEM_SLOTS);
    if (this.has(ProtocolFeature.BACKEND_REQ)) await this.openBackendChannel();
    await this.send(Request.SET_OWNER);
    this.features = offered & features & ~NOT_FOR_US;
  }

  async openBackendChannel(): Promise<void> {
    const [ours, theirs] = socketPair();
    using _sent = theirs;
    this.backendRequests?.[Symbol.dispose]();
    this.backendRequests = new BackendRequests(ours);
    await this.command(Request.SET_BACKEND_REQ_FD, NOTHING, [theirs.number]);
  }

  /** Makes guest memory and hands it over: by slots where negotiated, else as a table. */
  async setupMemory(regions: readonly { readonly gpa: number; readonly size: number }[]): Promise<void> {
    for (const { gpa, size } of regions) this.memory.add(gpa, size);
    await this.handMemory();
  }

  /** Hands over the memory there is. */
  async handMemory(): Promise<void> {
    if (this.has(ProtocolFeature.CONFIGURE_MEM_SLOTS)) {
      for (const region of this.memory.regions) await this.addRegion(region);
    } else {
      await this.setMemTable();
    }
  }

  async addRegion(region: MemoryRegion): Promise<bigint> {
    return await this.command(Request.ADD_MEM_REG, singleRegion(region), [region.file.file.number]);
  }

  async removeRegion(region: MemoryRegion): Promise<bigint> {
    return await this.command(Request.REM_MEM_REG, singleRegion(region));
  }

  async setMemTable(regions: readonly MemoryRegion[] = this.memory.regions): Promise<bigint> {
    const fds = regions.map(({ file }) => file.file.number);
    return await this.command(Request.SET_MEM_TABLE, memTable(regions), fds);
  }

  /**
   * Makes rings (one behind the other in the last region) and starts them as QEMU's block front-end does:
   * 2 40 39(8), per queue 8 10 9 12 13, 18 for all, 40 39(0xf).
   */
  async startQueues(
    count: number,
    { size = 128, bufferSpace = 1 << 20, firstIndex = 0 }: QueueOptions = {},
  ): Promise<void> {
    const region = this.memory.regions.at(-1);
    if (region === undefined) throw new VhostdError("invalid", "rings need memory: call setupMemory first");
    for (const queue of this.queues.splice(0)) closeQueue(queue);
    for (let index = 0; index < count; index++) {
      const base = region.file.gpa + index * DriverRing.span(size, bufferSpace);
      const { memory, features } = this;
      const ring = new DriverRing({ memory, base, size, features, bufferSpace, firstIndex });
      const kick = eventfd();
      this.queues.push({ index, kick, driver: new DriverQueue(ring, () => signalEventfd(kick.number)) });
    }
    await this.resumeQueues(this.queues.map(() => firstIndex));
  }

  /** Starts the rings there are at these bases, as after `stop`. */
  async resumeQueues(bases: readonly number[]): Promise<void> {
    await this.startRings(this.queues, bases);
  }

  /** Starts rings that somebody else keeps. @param bases by index; 0 unless said */
  async startRings(rings: readonly QueueSetup[], bases: readonly number[] = []): Promise<void> {
    await this.setFeatures();
    await this.setStatus(Status.featuresOk);
    for (const ring of rings) await this.setupQueue(ring, bases[ring.index] ?? 0);
    await this.enableAll(true);
    await this.setStatus(RUNNING);
  }

  async setFeatures(features = this.features): Promise<bigint> {
    return await this.command(Request.SET_FEATURES, u64(features));
  }

  /** 8 10 9 12 13. */
  async setupQueue(queue: QueueSetup, base = 0): Promise<void> {
    const { index, kick, driver } = queue;
    await this.setupRing(queue, base);
    await this.command(Request.SET_VRING_KICK, u64(BigInt(index)), [kick.number]);
    await this.command(Request.SET_VRING_CALL, u64(BigInt(index)), [driver.call.number]);
  }

  /** 8 10 9. */
  async setupRing(queue: RingSetup, base: number): Promise<void> {
    const { index, driver } = queue;
    await this.command(Request.SET_VRING_NUM, VRING_STATE.encode({ index, num: driver.ring.size }));
    await this.command(Request.SET_VRING_BASE, VRING_STATE.encode({ index, num: base }));
    await this.setAddresses(queue);
  }

  async setAddresses(queue: RingSetup, options: AddressOptions = {}): Promise<bigint> {
    return await this.command(Request.SET_VRING_ADDR, this.ringAddresses(queue, options));
  }

  /** Payload of SET_VRING_ADDR. */
  ringAddresses({ index, driver: { ring } }: RingSetup, { log = false }: AddressOptions = {}): Uint8Array {
    return VRING_ADDR.encode({
      index,
      flags: log ? VRING_ADDR_LOG : 0,
      descriptor: this.memory.userAddress(ring.desc),
      available: this.memory.userAddress(ring.driver),
      used: this.memory.userAddress(ring.device),
      log: log ? BigInt(ring.device) : 0n,
    });
  }

  async enable(index: number, enabled: boolean): Promise<bigint> {
    return await this.command(Request.SET_VRING_ENABLE, VRING_STATE.encode({ index, num: enabled ? 1 : 0 }));
  }

  /** 18 for every queue of the device, set up or not, as QEMU's block front-end does. */
  async enableAll(enabled: boolean): Promise<void> {
    // What is answered may count pairs.
    const told = this.has(ProtocolFeature.MQ) ? Number(await this.askU64(Request.GET_QUEUE_NUM)) : 1;
    const count = Math.max(told, ...this.queues.map(({ index }) => index + 1));
    for (let index = 0; index < count; index++) await this.enable(index, enabled);
  }

  /** 40 39: adds to the status, 0 resets. Nothing where STATUS is not negotiated. */
  async setStatus(bits: number): Promise<void> {
    if (!this.has(ProtocolFeature.STATUS)) return;
    const before = Number(await this.askU64(Request.GET_STATUS));
    await this.command(Request.SET_STATUS, u64(BigInt(bits === 0 ? 0 : before | bits)));
  }

  /** GET_VRING_BASE. */
  async getBase(index: number): Promise<number> {
    return VRING_STATE.read(await this.ask(Request.GET_VRING_BASE, VRING_STATE.encode({ index }))).num;
  }

  /**
   * Stops all queues.
   * @param order "old" as QEMU before May 2023: 39(0), 18(0) for all, 11 per queue; "new": 11 per queue, then 39(0)
   * @returns the base of each queue
   */
  async stop({ order }: { order: "old" | "new" }): Promise<number[]> {
    if (order === "old") await this.setStatus(0);
    await this.enableAll(false);
    const bases: number[] = [];
    for (const { index } of this.queues) bases.push(await this.getBase(index));
    if (order === "new") await this.setStatus(0);
    return bases;
  }

  /** @returns bytes of configuration space, or undefined where the back-end answers with an error */
  async getConfig(offset: number, size: number): Promise<Uint8Array | undefined> {
    const answer = await this.ask(Request.GET_CONFIG, config(offset, new Uint8Array(size)));
    return answer.byteLength === 0 ? undefined : answer.subarray(CONFIG.size);
  }

  async setConfig(offset: number, bytes: Uint8Array, flags = 0): Promise<bigint> {
    return await this.command(Request.SET_CONFIG, config(offset, bytes, flags));
  }

  /** As kill -9 of the VMM: everything is closed, nothing is said. */
  [Symbol.dispose](): void {
    this.channel[Symbol.dispose]();
    this.backendRequests?.[Symbol.dispose]();
    for (const queue of this.queues.splice(0)) closeQueue(queue);
    this.memory[Symbol.dispose]();
  }

  private async answer(request: number): Promise<Uint8Array> {
    const message = await Deadline.after(REPLY_TIMEOUT, `answer to request ${request}`).race(this.channel.receive());
    if (message === undefined) throw new VhostdError("connectionLost", `no answer to request ${request}: hung up`);
    for (const fd of message.fds) fd[Symbol.dispose]();
    if (message.request === request) return message.payload;
    throw new VhostdError("protocol", `the answer to request ${request} is one to ${message.request}`);
  }
}

/** The front-end as a VMM with `server=on`: it listens, the back-end connects. */
export class FrontendListener implements Disposable {
  private readonly listener: OwnedFd;

  constructor(readonly path: string) {
    this.listener = listenUnix(path, 0o600);
  }

  /** The next connection. @param timeout milliseconds */
  async accept(timeout = REPLY_TIMEOUT): Promise<VhostUserFrontend> {
    return new VhostUserFrontend(await this.acceptFd(timeout));
  }

  /** The socket of the next connection, for a front-end of another kind. @param timeout milliseconds */
  async acceptFd(timeout = REPLY_TIMEOUT): Promise<OwnedFd> {
    const ready = Promise.withResolvers<void>();
    using _watch = watch(this.listener.number, "in", () => ready.resolve());
    await Deadline.after(timeout, `connection to ${this.path}`).race(ready.promise);
    const fd = accept(this.listener.number);
    if (fd === undefined) throw new VhostdError("connectionLost", "the back-end connected and went away");
    return fd;
  }

  [Symbol.dispose](): void {
    if (!this.listener.closed) shutDown(this.listener.number);
    this.listener[Symbol.dispose]();
  }
}

export function u64(value: bigint): Uint8Array {
  return U64.encode({ value });
}

/** SET_VRING_KICK and SET_VRING_CALL without an fd. */
export function withoutFd(index: number): Uint8Array {
  return u64(BigInt(index) | VRING_NO_FD);
}

/** Payload of SET_MEM_TABLE. */
export function memTable(regions: readonly MemoryRegion[]): Uint8Array {
  const payload = new Uint8Array(MEM_TABLE.size + regions.length * MEMORY_REGION.size);
  MEM_TABLE.write(payload, { regions: regions.length });
  for (const [index, region] of regions.entries()) {
    MEMORY_REGION.write(payload, regionFields(region), MEM_TABLE.size + index * MEMORY_REGION.size);
  }
  return payload;
}

/** Payload of ADD_MEM_REG and REM_MEM_REG. */
export function singleRegion(region: MemoryRegion): Uint8Array {
  const payload = new Uint8Array(SINGLE_REGION_SIZE);
  MEMORY_REGION.write(payload, regionFields(region), SINGLE_REGION_PADDING);
  return payload;
}

/** Payload of GET_CONFIG and SET_CONFIG. */
export function config(offset: number, bytes: Uint8Array, flags = 0): Uint8Array {
  const payload = new Uint8Array(CONFIG.size + bytes.byteLength);
  CONFIG.write(payload, { offset, size: bytes.byteLength, flags });
  payload.set(bytes, CONFIG.size);
  return payload;
}

function regionFields({ file, userAddress }: MemoryRegion) {
  return { guestAddress: file.gpa, size: file.size, userAddress, fileOffset: 0 };
}

function closeQueue({ kick, driver }: FrontendQueue): void {
  driver[Symbol.dispose]();
  kick[Symbol.dispose]();
}
