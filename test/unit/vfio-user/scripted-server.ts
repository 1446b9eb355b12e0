import type { StructValue } from "../../../src/base/layout.ts";
import type { OwnedFd } from "../../../src/native/fd.ts";
import { MessageSocket } from "../../../src/native/message-socket.ts";
import { eventfd } from "../../../src/native/sys.ts";
import { encodeMessage, vfioUserFraming } from "../../../src/vfio-user/framing.ts";
import {
  Command,
  commandName,
  DEVICE_INFO,
  HEADER,
  HeaderFlag,
  IRQ_INFO,
  REGION_ACCESS,
  REGION_INFO,
  REGION_IO_FDS,
  RegionFlag,
  SUB_REGION,
} from "../../../src/vfio-user/messages.ts";
import { encodeVersion } from "../../../src/vfio-user/version.ts";

export interface Request {
  readonly header: StructValue<typeof HEADER.fields>;
  readonly body: Uint8Array;
  readonly fds: OwnedFd[];
}

/** `errno` makes an error reply; `silent` none at all; `header` replaces fields of the reply's header. */
export interface Answer {
  readonly body?: Uint8Array;
  /** Borrowed. */
  readonly fds?: readonly number[];
  readonly errno?: number;
  readonly silent?: boolean;
  readonly header?: Partial<{ id: number; command: number; flags: number }>;
}

export const BAR_SIZE = 0x4000;
/** What it says of itself: nothing beyond the specification. */
export const CAPABILITIES = {
  maxMsgFds: 8,
  maxDataTransfer: 1 << 20,
  maxDmaMaps: 16,
  pageSizes: 4096,
  kickFds: 0,
  queueStats: 0,
};

/** A vfio-user server that answers sanely, unless a test puts another answer in the place of a command's. */
export class ScriptedServer implements Disposable {
  readonly requests: Request[] = [];
  /** BAR 4 and the configuration space by region index. */
  readonly memory = new Map([
    [4, new Uint8Array(BAR_SIZE)],
    [7, new Uint8Array(256)],
  ]);
  readonly doorbells = [eventfd(), eventfd()];
  readonly script = new Map<number, (request: Request) => Answer | Promise<Answer>>();
  readonly ended: Promise<void>;
  private readonly socket: MessageSocket;

  constructor(fd: OwnedFd) {
    this.socket = new MessageSocket(fd, vfioUserFraming({ maxBody: 1 << 21, maxFds: 8 }));
    this.ended = this.serve().catch(() => {});
  }

  /** As it is on the wire. */
  send(bytes: Uint8Array, fds: readonly number[] = []): Promise<void> {
    return this.socket.send(bytes, fds);
  }

  /** The commands that have come so far. */
  get commands(): string[] {
    return this.requests.map(({ header }) => commandName(header.command));
  }

  [Symbol.dispose](): void {
    this.socket[Symbol.dispose]();
    for (const fd of this.doorbells) fd[Symbol.dispose]();
    for (const { fds } of this.requests) for (const fd of fds) fd[Symbol.dispose]();
  }

  private async serve(): Promise<void> {
    for (;;) {
      const message = await this.socket.receive();
      if (message === undefined) return;
      const request = { header: HEADER.read(message.header), body: message.body, fds: message.fds.splice(0) };
      this.requests.push(request);
      if ((request.header.flags & HeaderFlag.reply) === 0) void this.answer(request).catch(() => {});
    }
  }

  private async answer(request: Request): Promise<void> {
    const { command, id } = request.header;
    const { body, fds, errno, silent, header } = await (this.script.get(command)?.(request) ?? this.usual(request));
    if (silent === true) return;
    const flags = HeaderFlag.reply | (errno === undefined ? 0 : HeaderFlag.error);
    await this.send(encodeMessage({ id, command, flags, error: errno ?? 0, ...header }, body), fds);
  }

  /** What a sane server says. */
  usual({ header, body }: Request): Answer {
    switch (header.command) {
      case Command.version:
        return { body: encodeVersion({ major: 0, minor: 1, capabilities: CAPABILITIES }) };
      case Command.getInfo:
        return { body: DEVICE_INFO.encode({ argsz: 16, flags: 3, regions: 9, irqs: 5 }) };
      case Command.getRegionInfo: {
        const { index } = REGION_INFO.read(body);
        const size = this.memory.get(index)?.length ?? 0;
        return { body: REGION_INFO.encode({ argsz: 32, flags: RegionFlag.read | RegionFlag.write, index, size }) };
      }
      case Command.getRegionIoFds:
        return { body: ioFds([0x3000, 0x3004]), fds: this.doorbells.map(({ number }) => number) };
      case Command.getIrqInfo:
        return { body: IRQ_INFO.encode({ argsz: 16, flags: 1, index: 2, count: 3 }) };
      case Command.regionRead: {
        const access = REGION_ACCESS.read(body);
        const data = this.memory.get(access.region)!.subarray(access.offset, access.offset + access.count);
        return { body: Uint8Array.of(...REGION_ACCESS.encode(access), ...data) };
      }
      case Command.regionWrite: {
        const access = REGION_ACCESS.read(body);
        this.memory.get(access.region)?.set(body.subarray(REGION_ACCESS.size), access.offset);
        return { body: REGION_ACCESS.encode(access) };
      }
      default:
        return {};
    }
  }
}

/** A list of eventfds for BAR 4, one for each offset. */
export function ioFds(
  offsets: readonly number[],
  entry: Partial<StructValue<typeof SUB_REGION.fields>> = {},
): Uint8Array {
  const argsz = REGION_IO_FDS.size + offsets.length * SUB_REGION.size;
  const bytes = new Uint8Array(argsz);
  REGION_IO_FDS.write(bytes, { argsz, index: 4, count: offsets.length });
  for (const [i, offset] of offsets.entries()) {
    SUB_REGION.write(bytes, { offset, size: 2, fdIndex: i, ...entry }, REGION_IO_FDS.size + i * SUB_REGION.size);
  }
  return bytes;
}
