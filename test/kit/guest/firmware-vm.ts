import { Deadline } from "../../../src/base/deadline.ts";
import type { Vm } from "./vm.ts";

/** A VM without an operating system: SeaBIOS and the program of boot-sector.S, at work 0.1 s after QEMU's start. */
export class FirmwareVm implements AsyncDisposable {
  constructor(
    readonly vm: Vm,
    private readonly report: string,
  ) {}

  /** Rounds of verified I/O, each on all disks, that this VM has reported. @throws Error when one went wrong */
  async rounds(): Promise<number> {
    const file = Bun.file(this.report);
    const text = (await file.exists()) ? await file.text() : "";
    if (!/^(b\.*)*$/.test(text))
      throw new Error(`the boot sector reports "${text.slice(-10)}" after ${text.length} signs`);
    return text.replaceAll("b", "").length;
  }

  /** Waits until that many rounds are done. */
  async reached(rounds: number, timeout = 20_000): Promise<void> {
    const deadline = Deadline.after(timeout, `${rounds} rounds of ${this.vm.options.name}`);
    await deadline.poll(async () => {
      if (!this.vm.qemu.running) throw new Error(`QEMU ended: ${this.vm.qemu.tail()}`);
      return (await this.rounds()) >= rounds || undefined;
    }, 5);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.vm[Symbol.asyncDispose]();
  }
}
