import { Deadline } from "../../../src/base/deadline.ts";
import { LineServer } from "./line-server.ts";

type Arguments = Readonly<Record<string, unknown>>;

export interface QmpEvent {
  readonly event: string;
  readonly data?: Readonly<Record<string, unknown>>;
}

interface Message {
  readonly QMP?: unknown;
  readonly id?: number;
  readonly return?: unknown;
  readonly error?: { readonly class: string; readonly desc: string };
  readonly event?: string;
  readonly data?: Readonly<Record<string, unknown>>;
}

/** QEMU's machine protocol (QEMU docs/interop/qmp-spec). Commands sent before QEMU has connected wait for it. */
export class Qmp implements Disposable {
  readonly events: QmpEvent[] = [];
  private readonly waiting = new Map<number, { resolve(value: unknown): void; reject(error: Error): void }>();
  private readonly lines: Promise<LineServer>;
  private nextId = 0;

  constructor(path: string) {
    this.lines = LineServer.listen(path, (line) => this.receive(line));
    this.lines.then(
      (lines) => lines.send(JSON.stringify({ execute: "qmp_capabilities" })),
      () => {},
    );
  }

  /** Resolves when QEMU can connect. */
  async listening(): Promise<void> {
    await this.lines;
  }

  /** @throws Error with QEMU's reason, VhostdError timedOut */
  async execute(command: string, parameters: Arguments = {}, timeout = 20_000): Promise<unknown> {
    const id = this.nextId++;
    const answer = Promise.withResolvers<unknown>();
    this.waiting.set(id, {
      resolve: answer.resolve,
      reject: (error) => answer.reject(new Error(`QMP ${command}: ${error.message}`, { cause: error })),
    });
    (await this.lines).send(JSON.stringify({ execute: command, arguments: parameters, id }));
    try {
      return await Deadline.after(timeout, `QMP ${command}`).race(answer.promise);
    } finally {
      this.waiting.delete(id);
    }
  }

  /** QEMU has ended: whoever waits for an answer learns why there is none. */
  fail(error: Error): void {
    for (const { reject } of this.waiting.values()) reject(error);
  }

  [Symbol.dispose](): void {
    this.lines.then(
      (lines) => lines[Symbol.dispose](),
      () => {},
    );
  }

  private receive(line: string): void {
    const message = JSON.parse(line) as Message;
    if (message.event) this.events.push({ event: message.event, ...(message.data ? { data: message.data } : {}) });
    if (message.id === undefined) return;
    const waiter = this.waiting.get(message.id);
    if (message.error) waiter?.reject(new Error(message.error.desc));
    else waiter?.resolve(message.return);
  }
}
