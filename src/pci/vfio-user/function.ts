import type { Deadline } from "../../base/deadline.ts";
import { asError, VhostdError } from "../../base/errors.ts";
import type { Json } from "../../base/json.ts";
import { duplicate, type OwnedFd } from "../../native/fd.ts";
import {
  Command,
  type CommandNumber,
  DEVICE_INFO,
  DMA_MAP,
  DMA_UNMAP,
  DmaFlag,
  IRQ_INFO,
  IRQ_SET,
  IrqIndex,
  IrqSetFlag,
  REGION_INFO,
  REGION_IO_FDS,
  Region,
  SET_KICK,
  SetKickFlag,
  SUB_REGION,
} from "../../vfio-user/messages.ts";
import type { PciAddress } from "../address.ts";
import type { DmaRange } from "../address-space.ts";
import type { Doorbell, FunctionSnapshot, Interrupts, PciFunction, QueueStats } from "../function.ts";
import { VfioUserClient } from "./client.ts";
import { PAGE_SIZE, VfioUserDoorbell } from "./doorbell.ts";
import { type FunctionRecord, parseFunctionRecord } from "./record.ts";
import { VfioUserRegion } from "./region.ts";
import {
  decodeDeviceInfo,
  decodeIoFds,
  decodeQueueStats,
  decodeRegionInfo,
  decodeVectorCount,
  type IoEventfd,
  type RegionInfo,
} from "./replies.ts";

/** Sub-regions asked for at first: as many doorbells as most devices have. */
const SUB_REGIONS_ASKED = 128;
const BARS = [0, 1, 2, 3, 4, 5] as const;

/** What the server says of one base address register, and its descriptors. */
interface Bar {
  readonly info: RegionInfo;
  readonly file: OwnedFd | undefined;
  readonly eventfds: readonly (IoEventfd & { readonly owned: OwnedFd })[];
}

/**
 * A PCI function served over vfio-user. Everything that does not change is asked when it is opened, so that all but
 * register accesses are free of messages later.
 */
export class VfioUserFunction implements PciFunction {
  readonly lost: Promise<Error>;
  readonly config: VfioUserRegion;
  readonly interrupts: Interrupts;

  private constructor(
    readonly address: PciAddress,
    private readonly client: VfioUserClient,
    private readonly configSize: number,
    private readonly bars: readonly Bar[],
    private readonly vectors: number,
    /** Every descriptor that came from the server, by its name in the record. */
    private readonly fds: ReadonlyMap<string, OwnedFd>,
  ) {
    this.lost = client.lost;
    this.config = new VfioUserRegion(client, Region.config, configSize);
    this.interrupts = { count: vectors, route: (vector, eventfd) => this.route(vector, eventfd) };
  }

  /** @throws VhostdError where nobody listens, the server breaks the protocol, or it serves no PCI device */
  static async connect(address: PciAddress, socketPath: string, deadline: Deadline): Promise<VfioUserFunction> {
    return VfioUserFunction.over(
      address,
      await VfioUserClient.connect(socketPath, peerName(address), deadline),
      deadline,
    );
  }

  /** The same over a connection that has agreed on the version. Takes the client. */
  static async over(address: PciAddress, client: VfioUserClient, deadline: Deadline): Promise<VfioUserFunction> {
    using undo = new DisposableStack();
    undo.use(client);
    const fds = new Map<string, OwnedFd>();
    undo.defer(() => closeAll(fds));
    const ask = new Inquiry(client, deadline, fds);
    const questions = [
      ask.deviceInfo(),
      ask.region(Region.config),
      ask.vectors(),
      ...BARS.map((bar) => ask.bar(bar)),
    ] as const;
    const [, config, vectors, ...bars] = await Promise.all(questions).catch(async (error) => {
      // No answer may bring descriptors any more once those that came are closed.
      client.hangUp(asError(error));
      await Promise.allSettled(questions);
      throw error;
    });
    if (config.size < 256) {
      throw new VhostdError("protocol", `the PCI configuration space has ${config.size} bytes; at least 256`);
    }
    undo.move();
    return new VfioUserFunction(address, client, config.size, bars, vectors, fds);
  }

  /**
   * Goes on with a function as another process left it. Nothing is sent. Takes the fds.
   * @throws VhostdError invalid where the record or the fds do not fit
   */
  static revive(address: PciAddress, data: Json, fds: Map<string, OwnedFd>): VfioUserFunction {
    using undo = new DisposableStack();
    undo.defer(() => closeAll(fds));
    const record = parseFunctionRecord(data);
    const named = (name: string): OwnedFd => {
      const fd = fds.get(name);
      if (fd === undefined) throw new VhostdError("invalid", `the record of ${address} lacks the descriptor ${name}`);
      return fd;
    };
    const bars = record.bars.map((bar, index) => ({
      info: bar.info,
      file: bar.info.mappable === null ? undefined : named(regionFdName(index)),
      eventfds: bar.eventfds.map((entry) => ({ ...entry, owned: named(doorbellFdName(index, entry.fd)) })),
    }));
    const socket = named("socket");
    const turns = named("turns");
    const client = VfioUserClient.revive(socket, turns, peerName(address), record.client);
    const own = new Map([...fds].filter(([, fd]) => fd !== socket && fd !== turns));
    undo.move();
    return new VfioUserFunction(address, client, record.configSize, bars, record.vectors, own);
  }

  region(bar: number): VfioUserRegion {
    const size = this.bars[bar]?.info.size ?? 0;
    if (size === 0) throw new VhostdError("barRead", `${this.address} has no BAR ${bar}`);
    return new VfioUserRegion(this.client, bar, size);
  }

  doorbell(bar: number, offset: number): Doorbell {
    const region = this.region(bar);
    const { info, file, eventfds } = this.bars[bar]!;
    const name = `doorbell 0x${offset.toString(16)} in BAR ${bar} of ${this.address}`;
    const paths = { eventfds, file, mappable: info.mappable };
    const takeKick = (kick: number | null) => this.setKick(bar, offset, kick);
    const { kickFds } = this.client.capabilities;
    return new VfioUserDoorbell(region, offset, paths, name, kickFds === 1 ? takeKick : undefined);
  }

  async reset(deadline: Deadline): Promise<void> {
    try {
      (await this.client.request(Command.reset, new Uint8Array(0), { deadline }))[Symbol.dispose]();
    } catch (cause) {
      if (cause instanceof VhostdError && cause.code === "timedOut") {
        throw new VhostdError("resetTimedOut", cause.message, { cause });
      }
      throw cause;
    }
  }

  get queueStats(): (() => Promise<readonly QueueStats[]>) | undefined {
    if (this.client.capabilities.queueStats !== 1) return undefined;
    return async () => {
      using reply = await this.client.request(Command.queueStats, new Uint8Array(0));
      return decodeQueueStats(reply);
    };
  }

  /** Smallest unit of a DMA mapping, bytes. */
  get dmaPageSize(): number {
    const sizes = BigInt(this.client.capabilities.pageSizes);
    return Number(sizes & -sizes);
  }

  /** Why the function is gone; undefined while it is there. */
  get gone(): Error | undefined {
    return this.client.ended;
  }

  /** The server may reach `range` through `fd` from now on. The fd is borrowed for the call. */
  async dmaMap(range: DmaRange, fd: number, deadline: Deadline): Promise<void> {
    const body = DMA_MAP.encode({
      argsz: DMA_MAP.size,
      flags: DmaFlag.readable | DmaFlag.writeable,
      offset: range.offset,
      address: range.iova,
      size: range.size,
    });
    (await this.client.request(Command.dmaMap, body, { fds: [fd], deadline }))[Symbol.dispose]();
  }

  /** When it resolves the server has let go of the range. */
  async dmaUnmap(range: DmaRange, deadline: Deadline): Promise<void> {
    const body = DMA_UNMAP.encode({ argsz: DMA_UNMAP.size, address: range.iova, size: range.size });
    (await this.client.request(Command.dmaUnmap, body, { deadline }))[Symbol.dispose]();
  }

  /** Ends the connection, which takes all memory from the server. `lost` resolves with the reason. */
  hangUp(reason: Error): void {
    this.client.hangUp(reason);
  }

  snapshot(): FunctionSnapshot {
    const bars = this.bars.map(({ info, eventfds }) => ({
      info,
      eventfds: eventfds.map(({ offset, size, match, fd }) => ({ offset, size, match, fd })),
    }));
    const record: FunctionRecord = {
      client: this.client.snapshot(),
      configSize: this.configSize,
      bars,
      vectors: this.vectors,
    };
    const fds = new Map<string, number>(Object.entries(this.client.fds));
    for (const [name, fd] of this.fds) fds.set(name, fd.number);
    return { data: record, fds };
  }

  abandon(): void {
    this.client.abandon();
    closeAll(this.fds);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.client[Symbol.dispose]();
    closeAll(this.fds);
  }

  private async setKick(bar: number, offset: number, kick: number | null): Promise<void> {
    const flags = kick === null ? 0 : SetKickFlag.connect;
    const body = SET_KICK.encode({ argsz: SET_KICK.size, flags, region: bar, offset });
    await this.tell(Command.setKick, body, kick);
  }

  private async route(vector: number, eventfd: number | null): Promise<void> {
    if (!Number.isInteger(vector) || vector < 0 || vector >= this.vectors) {
      throw new VhostdError("noVectors", `${this.address} has no vector ${vector}; it has ${this.vectors}`);
    }
    // With dataEventfd and without a descriptor the vector is de-assigned ("VFIO_USER_DEVICE_SET_IRQS").
    const body = IRQ_SET.encode({
      argsz: IRQ_SET.size,
      flags: IrqSetFlag.dataEventfd | IrqSetFlag.actionTrigger,
      index: IrqIndex.msix,
      start: vector,
      count: 1,
    });
    await this.tell(Command.setIrqs, body, eventfd);
  }

  /** The caller may close the eventfd before the server takes the message: its number could be another file's then. */
  private async tell(command: CommandNumber, body: Uint8Array, eventfd: number | null): Promise<void> {
    using own = eventfd === null ? undefined : duplicate(eventfd);
    const fds = own === undefined ? [] : [own.number];
    (await this.client.request(command, body, { fds }))[Symbol.dispose]();
  }
}

/** The questions asked of a server once. Descriptors of the answers go into `fds` under their names. */
class Inquiry {
  constructor(
    private readonly client: VfioUserClient,
    private readonly deadline: Deadline,
    private readonly fds: Map<string, OwnedFd>,
  ) {}

  async deviceInfo(): Promise<void> {
    const body = DEVICE_INFO.encode({ argsz: DEVICE_INFO.size });
    using reply = await this.client.request(Command.getInfo, body, { deadline: this.deadline });
    decodeDeviceInfo(reply);
  }

  async region(index: number): Promise<RegionInfo> {
    // Room for a list of mappable areas behind the fixed part.
    const body = REGION_INFO.encode({ argsz: 4096, index });
    using reply = await this.client.request(Command.getRegionInfo, body, { deadline: this.deadline });
    const info = decodeRegionInfo(reply, index, PAGE_SIZE);
    const [file] = info.mappable === null ? [] : reply.fds.splice(0);
    if (file !== undefined) this.fds.set(regionFdName(index), file);
    return info;
  }

  async vectors(): Promise<number> {
    const body = IRQ_INFO.encode({ argsz: IRQ_INFO.size, index: IrqIndex.msix });
    using reply = await this.client.request(Command.getIrqInfo, body, { deadline: this.deadline });
    return decodeVectorCount(reply, IrqIndex.msix);
  }

  async bar(index: number): Promise<Bar> {
    const info = await this.region(index);
    const eventfds = info.size === 0 ? [] : await this.ioEventfds(index, info.size, SUB_REGIONS_ASKED);
    return { info, file: this.fds.get(regionFdName(index)), eventfds };
  }

  /** A server that does not know the question, or has none for this region, answers with an error. */
  private async ioEventfds(index: number, size: number, asked: number): Promise<Bar["eventfds"]> {
    const argsz = REGION_IO_FDS.size + asked * SUB_REGION.size;
    const body = REGION_IO_FDS.encode({ argsz, index });
    const reply = await this.client
      .request(Command.getRegionIoFds, body, { deadline: this.deadline })
      .catch((error: unknown) => {
        if (error instanceof VhostdError && error.code === "system") return undefined;
        throw error;
      });
    if (reply === undefined) return [];
    using answer = reply;
    const entries = decodeIoFds(answer, { index, size }, argsz);
    if ("needs" in entries) {
      return this.ioEventfds(index, size, Math.ceil((entries.needs - REGION_IO_FDS.size) / SUB_REGION.size));
    }
    const owned = answer.fds.splice(0);
    for (const [i, fd] of owned.entries()) this.fds.set(doorbellFdName(index, i), fd);
    return entries.map((entry) => ({ ...entry, owned: owned[entry.fd]! }));
  }
}

function peerName(address: PciAddress): string {
  return `the vfio-user server of ${address}`;
}

function regionFdName(bar: number): string {
  return `region.${bar}`;
}

function doorbellFdName(bar: number, index: number): string {
  return `doorbell.${bar}.${index}`;
}

function closeAll(fds: ReadonlyMap<string, OwnedFd>): void {
  for (const fd of fds.values()) fd[Symbol.dispose]();
}
