import { mkdtemp, open, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { Deadline } from "../../../src/base/deadline.ts";
import { type Accelerator, findAccelerator } from "./accelerator.ts";
import { assembleBootSector, readCounter } from "./boot-sector.ts";
import { Guest } from "./guest.ts";
import { buildGuestImage, type GuestImage } from "./image.ts";
import { Stack } from "./stack.ts";
import { Vm, type VmOptions } from "./vm.ts";

export interface LabOptions {
  /** Virtqueues of the VF and of QEMU's device. */
  readonly queues?: number;
  /** MiB. */
  readonly diskSize?: number;
  /** Who listens on the vhost-user socket. The daemon is told when the VF is added. */
  readonly listener?: "qemu" | "daemon";
}

/** What a VM of the lab may have beside the disk. */
export type LabVmOptions = Partial<Pick<VmOptions, "processors" | "memory" | "hotplugMemory">>;

/** One disk image, one software VF, one daemon, and VMs that use the disk one after the other. */
export class Lab implements AsyncDisposable {
  private readonly machines: AsyncDisposable[] = [];
  private started = 0;

  private constructor(
    private readonly options: Required<LabOptions>,
    readonly directory: string,
    readonly image: GuestImage,
    readonly accelerator: Accelerator,
    readonly stack: Stack,
  ) {}

  /** Starts the software PF. The daemon and the VMs are started by the test. */
  static async create(options: LabOptions = {}): Promise<Lab> {
    const { queues = 1, diskSize = 128, listener = "qemu" } = options;
    const image = await buildGuestImage();
    const accelerator = await findAccelerator(image);
    const directory = await mkdtemp(join(tmpdir(), "lab-"));
    try {
      const disk = join(directory, "disk.img");
      await using file = await open(disk, "w");
      await file.truncate(diskSize * 2 ** 20);
      const stack = await Stack.start({ directory, disk, queues });
      return new Lab({ queues, diskSize, listener }, directory, image, accelerator, stack);
    } catch (error) {
      await rm(directory, { recursive: true, force: true });
      throw error;
    }
  }

  /** As `create`, with the daemon running and the VF waiting for its front-end. */
  static async ready(options: LabOptions = {}): Promise<Lab> {
    const lab = await Lab.create(options);
    try {
      await lab.startDaemon();
    } catch (error) {
      await lab[Symbol.asyncDispose]();
      throw error;
    }
    return lab;
  }

  get disk(): string {
    return join(this.directory, "disk.img");
  }

  async startDaemon(): Promise<void> {
    await this.stack.startDaemon();
    await this.stack.addVf(this.socket, ...(this.options.listener === "daemon" ? ["--server"] : []));
  }

  /** Starts a Linux guest; it may still be waiting for the daemon. */
  async startGuest(options: LabVmOptions = {}): Promise<Guest> {
    const guest = await Guest.start({ ...this.vmOptions("linux"), ...options, image: this.image });
    this.machines.push(guest);
    return guest;
  }

  /** Starts a Linux guest and waits until it takes commands. */
  async bootGuest(options: LabVmOptions = {}): Promise<Guest> {
    const guest = await this.startGuest(options);
    await guest.booted(1);
    return guest;
  }

  /** Puts the program of boot-sector.S onto the disk. */
  async writeBootSector(): Promise<void> {
    await using file = await open(this.disk, "r+");
    await file.write(await assembleBootSector(), 0, 512, 0);
  }

  /** Starts a VM that runs the boot sector of the disk. */
  async startFirmwareVm(): Promise<FirmwareVm> {
    const options = this.vmOptions("firmware");
    const report = join(this.directory, `${options.name}.report`);
    const port = ["-chardev", `file,id=report,path=${report}`, "-device", "isa-debugcon,iobase=0xe9,chardev=report"];
    const vm = new FirmwareVm(await Vm.start({ ...options, memory: 32, arguments: port }), report, this.disk);
    this.machines.push(vm);
    return vm;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const machine of this.machines.reverse()) await machine[Symbol.asyncDispose]();
    await this.stack[Symbol.asyncDispose]();
    await rm(this.directory, { recursive: true, force: true });
  }

  private get socket(): string {
    return join(this.directory, "vhost.sock");
  }

  private vmOptions(kind: string): VmOptions {
    const { queues, listener } = this.options;
    return {
      directory: this.directory,
      name: `${kind}${this.started++}`,
      accelerator: this.accelerator,
      disks: [{ socket: this.socket, queues, role: listener === "qemu" ? "listen" : "connect" }],
    };
  }
}

/** A VM without an operating system: SeaBIOS and the program of boot-sector.S, at work 0.1 s after QEMU's start. */
export class FirmwareVm implements AsyncDisposable {
  constructor(
    readonly vm: Vm,
    private readonly report: string,
    private readonly disk: string,
  ) {}

  /** Rounds of verified I/O that this VM has reported. @throws Error when one went wrong */
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

  /** The counter on the disk. @throws Error when its copies differ */
  counter(): Promise<number> {
    return readCounter(this.disk);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.vm[Symbol.asyncDispose]();
  }
}
