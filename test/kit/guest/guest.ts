import { join } from "node:path";
import { Deadline } from "../../../src/base/deadline.ts";
import { DESCRIPTION_VARIABLE } from "../machine/description.ts";
import type { GuestImage } from "./image.ts";
import { LineServer } from "./line-server.ts";
import { Vm, type VmOptions } from "./vm.ts";

export interface GuestOptions extends VmOptions {
  readonly image: GuestImage;
}

export interface CommandResult {
  readonly code: number;
  readonly output: string;
}

/** Longest script in base64: the port has room for one page while the guest's shell is busy. */
const MAX_REQUEST = 4000;
/** Milliseconds from QEMU's start, or a reset, to the first command, on a busy machine without KVM; inside a VM, too. */
const BOOT_TIMEOUT = process.env[DESCRIPTION_VARIABLE] === undefined ? 60_000 : 280_000;

/**
 * QEMU's end of the channel to initramfs/init, over the unix socket at `path`. Not a serial port: of an emulated UART's
 * queue the last bytes were seen to stay where they are, without an interrupt, once the guest was idle.
 */
export function commandChannel(path: string): string[] {
  return [
    ...["-chardev", `socket,id=channel,path=${path}`, "-device", "virtio-serial-pci,disable-legacy=on"],
    ...["-device", "virtserialport,chardev=channel,name=channel"],
  ];
}

/**
 * Without KVM, QEMU 7.2 takes a vhost-user-net card's MSI-X vectors for KVM's and dies of a null pointer as soon as a driver
 * has unmasked one. The guest then shares one INTx interrupt between the queues; the back-end's side is the same.
 */
function kernelParameters({ accelerator, nics = [] }: GuestOptions): string {
  const parameters = "console=ttyS0 quiet panic=-1 tsc=reliable no_timer_check";
  return accelerator === "tcg" && nics.length > 0 ? `${parameters} pci=nomsi` : parameters;
}

/** A Linux guest that runs shell commands for us (initramfs/init). */
export class Guest implements AsyncDisposable {
  private readonly answers = new Map<string, { resolve(result: CommandResult): void; reject(error: Error): void }>();
  private boots = 0;
  private nextId = 0;

  private constructor(
    readonly vm: Vm,
    private readonly channel: LineServer,
  ) {
    vm.qemu.exited.then((how) => this.fail(new Error(`QEMU ended (${how}): ${vm.qemu.tail()}`)));
  }

  /** Starts QEMU. The guest can be asked for commands at once; they run when it has booted. */
  static async start(options: GuestOptions): Promise<Guest> {
    const path = join(options.directory, `${options.name}.channel`);
    let guest: Guest | undefined;
    const channel = await LineServer.listen(path, (line) => guest?.receive(line));
    const vm = await Vm.start({
      ...options,
      arguments: [
        ...commandChannel(path),
        ...["-kernel", options.image.kernel, "-initrd", options.image.initramfs],
        ...["-append", kernelParameters(options)],
        ...(options.arguments ?? []),
      ],
    });
    guest = new Guest(vm, channel);
    return guest;
  }

  /** Starts QEMU and waits for the first boot. */
  static async boot(options: GuestOptions): Promise<Guest> {
    const guest = await Guest.start(options);
    await guest.booted(1);
    return guest;
  }

  /** How often the guest has come up. */
  get bootCount(): number {
    return this.boots;
  }

  /** Waits until the guest has come up `count` times. @throws Error with the end of its console */
  async booted(count: number, timeout = BOOT_TIMEOUT): Promise<void> {
    const deadline = Deadline.after(timeout, `boot ${count} of ${this.vm.options.name}`);
    try {
      await deadline.poll(() => {
        if (!this.vm.qemu.running) throw new Error(`QEMU ended: ${this.vm.qemu.tail()}`);
        return this.boots >= count || undefined;
      }, 5);
    } catch (error) {
      throw await this.explained(error);
    }
  }

  /**
   * Runs a shell script and waits for it.
   * @returns standard output and standard error in one
   * @throws Error when it fails, the guest reboots or QEMU ends; VhostdError timedOut
   */
  async run(script: string, timeout = 60_000): Promise<string> {
    const { code, output } = await this.attempt(script, timeout);
    if (code !== 0) throw new Error(`in the guest, "${script}" ended with ${code}:\n${output}`);
    return output.trimEnd();
  }

  /** As `run`, with the exit code as part of the answer. */
  async attempt(script: string, timeout = 60_000): Promise<CommandResult> {
    const id = `${this.nextId++}`;
    const answer = Promise.withResolvers<CommandResult>();
    this.answers.set(id, answer);
    try {
      this.post(id, script);
      return await Deadline.after(timeout, `"${script}" in the guest`).race(answer.promise);
    } catch (error) {
      throw await this.explained(error);
    } finally {
      this.answers.delete(id);
    }
  }

  /** Has the guest run a script that gives no answer, such as a reboot. */
  post(id: string, script: string): void {
    const encoded = Buffer.from(script).toString("base64");
    if (encoded.length > MAX_REQUEST) throw new Error(`a script of ${script.length} bytes is too long for the guest`);
    this.channel.send(`${id} ${encoded}`);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.vm[Symbol.asyncDispose]();
    this.channel[Symbol.dispose]();
  }

  private receive(line: string): void {
    if (announcesBoot(line)) {
      this.boots++;
      if (this.boots > 1) this.fail(new Error("the guest has rebooted"));
      return;
    }
    const [id = "", code = "", output = ""] = line.split(" ");
    this.answers.get(id)?.resolve({ code: Number(code), output: Buffer.from(output, "base64").toString() });
  }

  private fail(error: Error): void {
    for (const { reject } of this.answers.values()) reject(error);
  }

  /** The error with what the guest's console said last: a kernel's complaint is seldom repeated elsewhere. */
  private async explained(error: unknown): Promise<Error> {
    const console = (await this.vm.console()).trimEnd().split("\n").slice(-15).join("\n");
    return new Error(`${error instanceof Error ? error.message : error}\nconsole of the guest:\n${console}`);
  }
}

/**
 * The first line of a guest that has come up. One that was reset in the middle of an answer has left the beginning of
 * that in front of it.
 */
export function announcesBoot(line: string): boolean {
  return /ready [0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/.test(line);
}
