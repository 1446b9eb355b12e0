import { closeSync, constants, openSync, readdirSync, readFileSync, readSync, writeSync } from "node:fs";
import { join } from "node:path";
import { Deadline } from "../../../src/base/deadline.ts";
import { QMP_PORT } from "./command-line.ts";

interface Answer {
  readonly id?: string;
  readonly return?: unknown;
  readonly error?: { readonly class: string; readonly desc: string };
}

const PORTS = "/sys/class/virtio-ports";
/** Milliseconds, for QEMU's answer and for other processes of the machine that ask, too. */
const TIMEOUT = 20_000;

/** @see Machine.qmp */
export async function executeQmp(command: string, parameters: Readonly<Record<string, unknown>>): Promise<unknown> {
  const deadline = Deadline.after(TIMEOUT, `QMP ${command}`);
  using port = await QmpPort.open(deadline);
  const ask = () => port.execute(command, parameters, deadline);
  let { error, return: result } = await ask();
  if (error?.class === "CommandNotFound") {
    // The first one of the machine: QEMU's end of the port is never closed.
    await port.execute("qmp_capabilities", {}, deadline);
    ({ error, return: result } = await ask());
  }
  if (error !== undefined) throw new Error(`QMP ${command}: ${error.desc}`);
  return result;
}

/** A virtio-serial port behind which QEMU listens; the kernel lets one process open it at a time. */
class QmpPort implements Disposable {
  private partial = "";
  private readonly buffer = Buffer.alloc(16 << 10);

  private constructor(private readonly fd: number) {}

  static async open(deadline: Deadline): Promise<QmpPort> {
    const name = readdirSync(PORTS).find((port) => readFileSync(join(PORTS, port, "name"), "utf8").trim() === QMP_PORT);
    if (name === undefined) throw new Error(`this machine has no virtio port named ${QMP_PORT}`);
    return deadline.poll(() => {
      try {
        return new QmpPort(openSync(join("/dev", name), constants.O_RDWR | constants.O_NONBLOCK));
      } catch (error) {
        if ((error as NodeJS.ErrnoException).code === "EBUSY") return undefined;
        throw error;
      }
    }, 20);
  }

  async execute(command: string, parameters: Readonly<Record<string, unknown>>, deadline: Deadline): Promise<Answer> {
    const id = crypto.randomUUID();
    const request = Buffer.from(`${JSON.stringify({ execute: command, arguments: parameters, id })}\n`);
    writeSync(this.fd, request);
    return deadline.poll(() => this.lines().find((answer) => answer.id === id), 2);
  }

  [Symbol.dispose](): void {
    closeSync(this.fd);
  }

  /** What has come: greetings, events, answers to others that did not wait for them. */
  private lines(): Answer[] {
    const lines = (this.partial + this.arrived()).split("\n");
    this.partial = lines.pop() ?? "";
    return lines.filter((line) => line.trim() !== "").map((line) => JSON.parse(line) as Answer);
  }

  private arrived(): string {
    let text = "";
    try {
      for (;;) {
        const length = readSync(this.fd, this.buffer, 0, this.buffer.length, null);
        if (length === 0) return text;
        text += this.buffer.toString("utf8", 0, length);
      }
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === "EAGAIN") return text;
      throw error;
    }
  }
}
