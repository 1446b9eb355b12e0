import { Deadline } from "../base/deadline.ts";
import { VhostdError } from "../base/errors.ts";
import type { Logger } from "../base/log.ts";
import type { OwnedFd } from "../native/fd.ts";
import { type Message, MessageSocket } from "../native/message-socket.ts";
import { encodeMessage, vfioUserFraming } from "../vfio-user/framing.ts";
import {
  Command,
  commandName,
  DEVICE_INFO,
  DeviceFlag,
  DMA_UNMAP,
  HEADER,
  HeaderFlag,
  IoFdType,
  IRQ_INFO,
  IrqIndex,
  IrqInfoFlag,
  QUEUE_COUNTERS,
  QUEUE_STATS,
  REGION_ACCESS,
  REGION_INFO,
  REGION_IO_FDS,
  RegionFlag,
  SUB_REGION,
} from "../vfio-user/messages.ts";
import { type Capabilities, decodeVersion, encodeVersion, PROTOCOL_VERSION } from "../vfio-user/version.ts";
import { NOTIFY_MULTIPLIER, VIRTIO_BAR, VirtioBlock } from "./layout.ts";
import {
  dataOf,
  decodeAccess,
  decodeIoFdsRequest,
  decodeIrqIndex,
  decodeMap,
  decodeRegionIndex,
  decodeSetIrqs,
  decodeSetKick,
  decodeUnmap,
  refusal,
  SERVER_CAPABILITIES,
} from "./requests.ts";
import type { SoftFunction } from "./soft-function.ts";

/** Regions and interrupt types that VFIO knows of a PCI device. */
const REGIONS = 9;
const IRQ_TYPES = 5;
const DOORBELL_WIDTH = 2;
const EINVAL = 22;
const EBUSY = 16;
const EOPNOTSUPP = 95;
/** Milliseconds for a client that is turned away to ask for something, and to take the answer. */
const GREETING_TIMEOUT = 1000;
/** errno values end here; numbers of our own begin above. */
const ERRNO_MAX = 160;

interface Request {
  readonly body: Uint8Array;
  /** Those that are kept are taken out; the rest is closed with the message. */
  readonly fds: OwnedFd[];
}

interface Answer {
  readonly body?: Uint8Array;
  /** Borrowed. */
  readonly fds?: readonly number[];
}

/** The server's end of one vfio-user connection: it has the function to itself. Requests are served in order. */
export class ClientConnection {
  private readonly socket: MessageSocket;
  /** What the client takes; undefined until it has said so, which must be first. */
  private client: Capabilities | undefined;

  /** Takes the fd. */
  constructor(
    fd: OwnedFd,
    private readonly fn: SoftFunction,
    private readonly log: Logger,
  ) {
    this.socket = new MessageSocket(fd, serverFraming());
  }

  /** Serves until the client hangs up or breaks the protocol. The function is as new when this resolves. */
  async run(): Promise<void> {
    try {
      for (;;) {
        using message = await this.socket.receive();
        if (message === undefined) break;
        await this.serve(message);
      }
      this.log.debug("client hung up");
    } catch (error) {
      const own = error instanceof VhostdError && error.code === "cancelled";
      if (!own) this.log.warn("client dismissed", error);
    } finally {
      this.close();
      await this.fn.release();
    }
  }

  /** Hangs up; `run` resolves. */
  close(): void {
    this.socket[Symbol.dispose]();
  }

  private async serve(message: Message): Promise<void> {
    const header = HEADER.read(message.header);
    if ((header.flags & HeaderFlag.typeMask) !== 0) {
      throw new VhostdError("protocol", `client sent a message of type ${header.flags & HeaderFlag.typeMask}`);
    }
    if ((header.command === Command.version) !== (this.client === undefined)) {
      throw new VhostdError("protocol", `client sent ${commandName(header.command)} where version comes first, once`);
    }
    const reply = { id: header.id, command: header.command, flags: HeaderFlag.reply };
    let bytes: Uint8Array;
    let fds: readonly number[] = [];
    try {
      const answer = await this.handle(header.command, message);
      bytes = encodeMessage(reply, answer.body);
      fds = answer.fds ?? [];
    } catch (error) {
      // Without a version nothing else can be said.
      if (this.client === undefined || (error instanceof VhostdError && error.code === "protocol")) throw error;
      this.log.warn(`${commandName(header.command)} refused`, error);
      bytes = encodeMessage({ ...reply, flags: HeaderFlag.reply | HeaderFlag.error, error: errnoOf(error) });
    }
    if ((header.flags & HeaderFlag.noReply) === 0) await this.socket.send(bytes, fds);
  }

  private handle(command: number, request: Request): Answer | Promise<Answer> {
    switch (command) {
      case Command.version:
        return this.version(request);
      case Command.dmaMap:
        return this.dmaMap(request);
      case Command.dmaUnmap:
        return this.dmaUnmap(request);
      case Command.getInfo:
        return { body: deviceInfo() };
      case Command.getRegionInfo:
        return this.regionInfo(request);
      case Command.getRegionIoFds:
        return this.regionIoFds(request);
      case Command.getIrqInfo:
        return this.irqInfo(request);
      case Command.setIrqs:
        return this.setIrqs(request);
      case Command.regionRead:
        return this.regionRead(request);
      case Command.regionWrite:
        return this.regionWrite(request);
      case Command.reset:
        return this.reset();
      case Command.setKick:
        return this.setKick(request);
      case Command.queueStats:
        return this.queueStats();
      default:
        throw refusal(EOPNOTSUPP, commandName(command));
    }
  }

  private version({ body }: Request): Answer {
    const { major, minor, capabilities } = decodeVersion(body);
    if (major !== PROTOCOL_VERSION.major) {
      throw new VhostdError("protocol", `client speaks version ${major}.${minor}; ${PROTOCOL_VERSION.major} is spoken`);
    }
    this.client = capabilities;
    const agreed = Math.min(minor, PROTOCOL_VERSION.minor);
    const { kickFds, queueStats } = capabilities;
    const offered = { ...SERVER_CAPABILITIES, maxDmaMaps: this.fn.maxDmaMaps, kickFds, queueStats };
    return { body: encodeVersion({ major, minor: agreed, capabilities: offered }) };
  }

  private async dmaMap({ body, fds }: Request): Promise<Answer> {
    const { iova, size, offset, writable } = decodeMap(body, fds);
    await this.fn.map(iova, size, fds[0]!.number, offset, writable);
    return {};
  }

  private async dmaUnmap({ body }: Request): Promise<Answer> {
    const range = decodeUnmap(body);
    if (range === "all") await this.fn.unmapAll();
    else await this.fn.unmap(range.iova, range.size);
    return { body: body.slice(0, DMA_UNMAP.size) };
  }

  private regionInfo({ body }: Request): Answer {
    const { index } = decodeRegionIndex(body, REGIONS);
    const size = this.fn.regionSize(index);
    const flags = size === 0 ? 0 : RegionFlag.read | RegionFlag.write;
    return { body: REGION_INFO.encode({ argsz: REGION_INFO.size, flags, index, size }) };
  }

  /** One eventfd for each doorbell, as many as the client takes in one message. */
  private regionIoFds({ body }: Request): Answer {
    const { index, argsz } = decodeIoFdsRequest(body, REGIONS);
    const { queues } = this.fn.layout;
    const count =
      index === VIRTIO_BAR ? Math.min(queues, this.client?.maxMsgFds ?? 1, SERVER_CAPABILITIES.maxMsgFds) : 0;
    const needed = REGION_IO_FDS.size + count * SUB_REGION.size;
    const fits = argsz >= needed;
    const answer = new Uint8Array(fits ? needed : REGION_IO_FDS.size);
    REGION_IO_FDS.write(answer, { argsz: needed, index, count });
    if (!fits) return { body: answer };
    for (let queue = 0; queue < count; queue++) {
      const offset = VirtioBlock.notify.offset + queue * NOTIFY_MULTIPLIER;
      const entry = { offset, size: DOORBELL_WIDTH, fdIndex: queue, type: IoFdType.ioeventfd };
      SUB_REGION.write(answer, entry, REGION_IO_FDS.size + queue * SUB_REGION.size);
    }
    return { body: answer, fds: Array.from({ length: count }, (_, queue) => this.fn.doorbell(queue)) };
  }

  private irqInfo({ body }: Request): Answer {
    const { index } = decodeIrqIndex(body, IRQ_TYPES);
    const msix = index === IrqIndex.msix;
    const flags = msix ? IrqInfoFlag.eventfd | IrqInfoFlag.noResize : 0;
    return { body: IRQ_INFO.encode({ argsz: IRQ_INFO.size, flags, index, count: msix ? this.fn.layout.vectors : 0 }) };
  }

  private setIrqs({ body, fds }: Request): Answer {
    const change = decodeSetIrqs(body, fds, this.fn.layout.vectors);
    for (let i = 0; i < change.count; i++) {
      const vector = change.start + i;
      // Taken one by one: those that are left when something fails are closed with the message.
      if (change.action !== "trigger") this.fn.route(vector, fds.shift());
      else if (change.chosen[i] === true) this.fn.interrupts.signal(vector);
    }
    return {};
  }

  private regionRead({ body }: Request): Answer {
    const access = this.access(body);
    const answer = new Uint8Array(REGION_ACCESS.size + access.count);
    REGION_ACCESS.write(answer, access);
    answer.set(this.fn.read(access.region, access.offset, access.count), REGION_ACCESS.size);
    return { body: answer };
  }

  private async regionWrite({ body }: Request): Promise<Answer> {
    const access = this.access(body);
    await this.fn.write(access.region, access.offset, dataOf(body, access));
    return { body: REGION_ACCESS.encode(access) };
  }

  private access(body: Uint8Array) {
    return decodeAccess(body, (region) => this.fn.regionSize(region));
  }

  private async reset(): Promise<Answer> {
    await this.fn.reset();
    return {};
  }

  private setKick({ body, fds }: Request): Answer {
    const { queue, connect } = decodeSetKick(body, fds, (region, offset) => this.queueAt(region, offset));
    this.fn.setKick(queue, connect ? fds[0]!.number : null);
    return {};
  }

  private queueStats(): Answer {
    const counters = this.fn.stats();
    const body = new Uint8Array(QUEUE_STATS.size + counters.length * QUEUE_COUNTERS.size);
    QUEUE_STATS.write(body, { count: counters.length });
    for (const [queue, stats] of counters.entries()) {
      QUEUE_COUNTERS.write(body, stats, QUEUE_STATS.size + queue * QUEUE_COUNTERS.size);
    }
    return { body };
  }

  /** The queue whose doorbell lies there. */
  private queueAt(region: number, offset: number): number | undefined {
    const queue = (offset - VirtioBlock.notify.offset) / NOTIFY_MULTIPLIER;
    const exists = Number.isInteger(queue) && queue >= 0 && queue < this.fn.layout.queues;
    return region === VIRTIO_BAR && exists ? queue : undefined;
  }
}

/** Answers the version of a client that came while another has the function, and hangs up. Takes the fd. */
export async function turnAway(fd: OwnedFd): Promise<void> {
  using socket = new MessageSocket(fd, serverFraming(), { sendTimeout: GREETING_TIMEOUT });
  using message = await Deadline.after(GREETING_TIMEOUT, "a client's first message").race(socket.receive());
  if (message === undefined) return;
  const { id, command } = HEADER.read(message.header);
  await socket.send(encodeMessage({ id, command, flags: HeaderFlag.reply | HeaderFlag.error, error: EBUSY }));
}

function serverFraming() {
  const { maxDataTransfer, maxMsgFds } = SERVER_CAPABILITIES;
  // Room for the fixed part of a request in front of its data.
  return vfioUserFraming({ maxBody: maxDataTransfer + 4096, maxFds: maxMsgFds });
}

function deviceInfo(): Uint8Array {
  const flags = DeviceFlag.reset | DeviceFlag.pci;
  return DEVICE_INFO.encode({ argsz: DEVICE_INFO.size, flags, regions: REGIONS, irqs: IRQ_TYPES });
}

function errnoOf(error: unknown): number {
  const number = error instanceof VhostdError ? error.number : EINVAL;
  return number < ERRNO_MAX ? number : EINVAL;
}
