import { mkdir, mkdtemp, open, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { DESCRIPTION_VARIABLE } from "../machine/description.ts";
import { type Accelerator, findAccelerator } from "./accelerator.ts";
import { all } from "./all.ts";
import { assembleBootSector, readCounter } from "./boot-sector.ts";
import { FirmwareVm } from "./firmware-vm.ts";
import { Guest } from "./guest.ts";
import { buildGuestImage, type GuestImage, type GuestKernel, quickestGuestKernel } from "./image.ts";
import { type Migration, Stack } from "./stack.ts";
import { Vm, type VmOptions } from "./vm.ts";

export interface LabOptions {
  /** Virtqueues of each VF and of QEMU's devices. */
  readonly queues?: number;
  /** MiB. */
  readonly diskSize?: number;
  /** Who listens on the vhost-user sockets. The daemons are told when their VFs are added. */
  readonly listener?: "qemu" | "daemon";
  /**
   * One disk for each. Both unless said: a test runs with either mover in one VM, which has booted as fast as with one
   * disk.
   */
  readonly migrations?: readonly Migration[];
  /** Of Linux guests; "debian" unless said, but inside a VM the quickest. */
  readonly kernel?: GuestKernel;
}

/** What a VM of the lab may have beside its disks. */
export type LabVmOptions = Partial<Pick<VmOptions, "processors" | "memory" | "hotplugMemory">>;

/** An image, a software VF that serves it, and a daemon that gives the VF to VMs. */
export interface LabDisk {
  readonly migration: Migration;
  /** As the guest calls it: vda. */
  readonly device: string;
  readonly image: string;
  /** vhost-user socket. */
  readonly socket: string;
  readonly stack: Stack;
}

/** Disks, and VMs that use all of them, one VM after the other. */
export class Lab implements AsyncDisposable {
  private readonly machines: AsyncDisposable[] = [];
  private started = 0;

  private constructor(
    private readonly options: Required<LabOptions>,
    readonly directory: string,
    readonly image: GuestImage,
    readonly accelerator: Accelerator,
    /** In the order of `migrations`. */
    readonly disks: readonly LabDisk[],
  ) {}

  /** Starts the software PFs. The daemons and the VMs are started by the test. */
  static async create(given: LabOptions = {}): Promise<Lab> {
    const kernel = process.env[DESCRIPTION_VARIABLE] === undefined ? "debian" : await quickestGuestKernel();
    const options = {
      queues: 1,
      diskSize: 128,
      listener: "qemu",
      migrations: ["none", "vendor"],
      kernel,
      ...given,
    } as const;
    const image = await buildGuestImage(options.kernel);
    const accelerator = await findAccelerator(image);
    const directory = await mkdtemp(join(tmpdir(), "lab-"));
    await using undo = new AsyncDisposableStack();
    undo.defer(() => rm(directory, { recursive: true, force: true }));
    const starting = options.migrations.map(async (migration, index) => {
      const disk = await makeDisk(join(directory, `${index}`), `vd${"abcdefgh"[index]}`, migration, options);
      undo.use(disk.stack);
      return disk;
    });
    const disks = await all(starting);
    undo.move();
    return new Lab(options, directory, image, accelerator, disks);
  }

  /** As `create`, with the daemons running and the VFs waiting for their front-ends. */
  static async ready(options: LabOptions = {}): Promise<Lab> {
    const lab = await Lab.create(options);
    try {
      await lab.startDaemons();
    } catch (error) {
      await lab[Symbol.asyncDispose]();
      throw error;
    }
    return lab;
  }

  /** What the guest calls its disks. */
  get devices(): string[] {
    return this.disks.map(({ device }) => device);
  }

  /** The disk of this kind. @throws Error where there is none */
  disk(migration: Migration): LabDisk {
    const found = this.disks.find((disk) => disk.migration === migration);
    if (found === undefined) throw new Error(`this lab has no disk with migration ${migration}`);
    return found;
  }

  async startDaemons(): Promise<void> {
    await all(this.disks.map((disk) => this.startDaemon(disk)));
  }

  /** Starts the daemon of a disk and gives it the VF. */
  async startDaemon({ stack, socket }: LabDisk): Promise<void> {
    await stack.startDaemon();
    await stack.addVf(socket, ...this.addOptions);
  }

  /** Takes the VF of a disk away and gives it back, with whatever VM is using it. */
  async renewVf({ stack, socket }: LabDisk): Promise<void> {
    await stack.command("vf", "-r", stack.vf);
    await stack.command("vf", "-a", stack.vf, "-v", socket, ...this.addOptions);
  }

  /** Starts a Linux guest; it may still be waiting for the daemons. */
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

  /** Puts the program of boot-sector.S onto the first disk. */
  async writeBootSector(): Promise<void> {
    await using file = await open(this.disks[0]!.image, "r+");
    await file.write(await assembleBootSector(), 0, 512, 0);
  }

  /** Starts a VM that runs the boot sector of the first disk; its program works on all of them. */
  async startFirmwareVm(): Promise<FirmwareVm> {
    const options = this.vmOptions("firmware");
    const report = join(this.directory, `${options.name}.report`);
    const port = ["-chardev", `file,id=report,path=${report}`, "-device", "isa-debugcon,iobase=0xe9,chardev=report"];
    const vm = new FirmwareVm(await Vm.start({ ...options, memory: 32, arguments: port }), report);
    this.machines.push(vm);
    return vm;
  }

  /** What the boot sector has counted on each disk. @throws Error when the copies on one differ */
  counters(): Promise<number[]> {
    return Promise.all(this.disks.map(({ image }) => readCounter(image)));
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const machine of this.machines.reverse()) await machine[Symbol.asyncDispose]();
    await Promise.all(this.disks.map(({ stack }) => stack[Symbol.asyncDispose]()));
    await rm(this.directory, { recursive: true, force: true });
  }

  private get addOptions(): string[] {
    return this.options.listener === "daemon" ? ["--server"] : [];
  }

  private vmOptions(kind: string): VmOptions {
    const { queues, listener } = this.options;
    return {
      directory: this.directory,
      name: `${kind}${this.started++}`,
      accelerator: this.accelerator,
      disks: this.disks.map(({ socket }) => ({ socket, queues, role: listener === "qemu" ? "listen" : "connect" })),
    };
  }
}

async function makeDisk(
  directory: string,
  device: string,
  migration: Migration,
  { queues, diskSize }: { readonly queues: number; readonly diskSize: number },
): Promise<LabDisk> {
  await mkdir(directory);
  const image = join(directory, "disk.img");
  await using file = await open(image, "w");
  await file.truncate(diskSize * 2 ** 20);
  const stack = await Stack.start({ directory, disk: image, queues, migration });
  return { migration, device, image, socket: join(directory, "vhost.sock"), stack };
}
