import { writeFile } from "node:fs/promises";
import { join } from "node:path";
import { socketPair } from "../../src/native/sys.ts";
import {
  encodeMessage,
  FLAG_NEED_REPLY,
  PROTOCOL_VERSION,
  ProtocolFeature,
  Request,
  U64,
  VRING_STATE,
} from "../../src/vhost-user/messages.ts";
import { VhostUserFrontend } from "../kit/frontend/frontend.ts";
import { buildProgram, output } from "./native.ts";

const ACCEPTED = Buffer.from(U64.encode({ value: 0n })).toString("hex");
/** Of the replaying program: the memory, and the connections behind it. */
const FIRST_FD = 3;

/** The used ring whose index says that a request has come back. */
export interface Completion {
  /** Of the index, in the memory file. */
  readonly offset: number;
  readonly index: number;
  readonly call: number;
}

interface Message {
  readonly bytes: Uint8Array;
  readonly fds: readonly number[];
  /** As the program takes it. */
  readonly answer: string;
}

/** What a front-end would say, with the answers that it expects. It is connected to nobody. */
export class ScriptedFrontend extends VhostUserFrontend {
  readonly messages: Message[] = [];
  private status = 0n;

  /** @param bases that GET_VRING_BASE answers, by ring */
  constructor(
    private readonly like: VhostUserFrontend,
    private readonly bases: readonly number[],
  ) {
    const [ours, theirs] = socketPair();
    theirs[Symbol.dispose]();
    super(ours);
    const { features, protocolFeatures, memory, queues, replies } = like;
    Object.assign(this, { features, protocolFeatures, memory, queues, replies });
  }

  get connection(): number {
    return this.like.channel.fd;
  }

  override async send(request: number, payload = new Uint8Array(), fds: readonly number[] = []): Promise<void> {
    if (request === Request.SET_STATUS) this.status = U64.read(payload).value;
    this.note(request, payload, fds, "-");
  }

  override async ask(request: number, payload = new Uint8Array(), fds: readonly number[] = []): Promise<Uint8Array> {
    if (request === Request.GET_VRING_BASE) {
      const { index } = VRING_STATE.read(payload);
      const answer = VRING_STATE.encode({ index, num: this.bases[index]! });
      this.note(request, payload, fds, Buffer.from(answer).toString("hex"));
      return answer;
    }
    this.note(request, payload, fds, "?");
    return U64.encode({ value: request === Request.GET_QUEUE_NUM ? BigInt(this.queues.length) : this.status });
  }

  override async answered(request: number, payload = new Uint8Array(), fds: readonly number[] = []): Promise<bigint> {
    const asks = this.has(ProtocolFeature.REPLY_ACK);
    this.note(request, payload, fds, asks ? ACCEPTED : "-", asks ? FLAG_NEED_REPLY : 0);
    return 0n;
  }

  /** What it has belongs to the front-end that it is like. */
  override [Symbol.dispose](): void {
    this.channel[Symbol.dispose]();
  }

  private note(request: number, payload: Uint8Array, fds: readonly number[], answer: string, flags = 0): void {
    this.messages.push({ bytes: encodeMessage(request, PROTOCOL_VERSION | flags, payload), fds, answer });
  }
}

/**
 * Has front-ends say what they are to say, all at once, in a program of its own: JavaScript would cost more than what is
 * measured.
 */
export class Replay {
  private constructor(
    private readonly program: string,
    private readonly script: string,
  ) {}

  /** @param directory for its files */
  static async build(directory: string): Promise<Replay> {
    return new Replay(await buildProgram("vhost-replay"), join(directory, "script"));
  }

  /**
   * @param memory file that the completions are in
   * @param completions by front-end; left out where it is not waited for any
   * @returns milliseconds from the first message to the last answer and the last completion
   */
  async run(
    memory: number,
    frontends: readonly ScriptedFrontend[],
    completions: readonly Completion[] = [],
  ): Promise<number> {
    const fds = [memory, ...frontends.map(({ connection }) => connection)];
    const place = (fd: number) => {
      const known = fds.indexOf(fd);
      return FIRST_FD + (known < 0 ? fds.push(fd) - 1 : known);
    };
    const lines: string[] = [];
    for (const [index, { messages }] of frontends.entries()) {
      for (const { bytes, fds, answer } of messages) {
        const list = fds.length === 0 ? "-" : fds.map(place).join(",");
        lines.push(`send ${index} ${Buffer.from(bytes).toString("hex")} ${list} ${answer}`);
      }
      const completion = completions[index];
      if (completion === undefined) continue;
      lines.push(`until ${index} ${completion.offset} ${completion.index} ${place(completion.call)}`);
    }
    await writeFile(this.script, lines.join("\n"));
    return Number(await output([this.program, this.script], fds)) / 1000;
  }
}
