import { join } from "node:path";
import { type Qemu, SYSTEM_QEMU } from "../machine/qemu.ts";
import type { Accelerator } from "./accelerator.ts";
import { Child } from "./child.ts";
import { Qmp } from "./qmp.ts";

/**
 * Whose the socket is. "listen": QEMU's side has server=on (the daemon's client mode); "connect": the daemon listens, and
 * QEMU tries once a second.
 */
export type SocketRole = "listen" | "connect";

/** A vhost-user-blk disk of a VM. QEMU does not start its machine before the back-end is there. */
export interface VhostDisk {
  readonly socket: string;
  readonly queues: number;
  readonly role?: SocketRole;
  /** Each queue has a doorbell page of its own, which a back-end may put one of its device's in the place of. On unless said. */
  readonly pagePerVq?: boolean;
}

/** A virtio-net card of a VM with a vhost-user back-end. QEMU does not start its machine before that is there. */
export interface VhostNic {
  readonly socket: string;
  /** Of queues: each has one for each direction. */
  readonly pairs: number;
  readonly mac: string;
  readonly role?: SocketRole;
  /** What QEMU tells guest and back-end; not a word of it unless said. */
  readonly mtu?: number;
  /** With the ROM that boots from the network. */
  readonly bootable?: boolean;
}

export interface VmOptions {
  /** Where its sockets and logs go. */
  readonly directory: string;
  /** Of its files, and in errors. */
  readonly name: string;
  readonly accelerator: Accelerator;
  /** The installed one unless said. */
  readonly qemu?: Qemu;
  readonly processors?: number;
  /** MiB, shared with the back-end as a memfd. */
  readonly memory?: number;
  /** MiB of hot-pluggable memory beside that. */
  readonly hotplugMemory?: number;
  readonly disks?: readonly VhostDisk[];
  readonly nics?: readonly VhostNic[];
  /** Of QEMU, beside those of every VM. */
  readonly arguments?: readonly string[];
}

/** A QEMU process with its QMP connection. */
export class Vm implements AsyncDisposable {
  readonly qemu: Child;
  readonly qmp: Qmp;

  private constructor(
    readonly options: VmOptions,
    qmp: Qmp,
    private readonly consolePath: string,
  ) {
    this.qmp = qmp;
    const log = join(options.directory, `${options.name}.log`);
    const { command, environment } = this.program;
    this.qemu = new Child([...command, ...this.commandLine()], { name: `QEMU ${options.name}`, log, environment });
    this.qemu.exited.then((how) => qmp.fail(new Error(`QEMU ended (${how}): ${this.qemu.tail()}`)));
  }

  /** Returns when the process runs; its disks may still be waiting for their back-end. */
  static async start(options: VmOptions): Promise<Vm> {
    const qmp = new Qmp(join(options.directory, `${options.name}.qmp`));
    await qmp.listening();
    return new Vm(options, qmp, join(options.directory, `${options.name}.console`));
  }

  /** What the guest wrote on its first serial port so far. */
  async console(): Promise<string> {
    const file = Bun.file(this.consolePath);
    return (await file.exists()) ? await file.text() : "";
  }

  /** Plugs a memory module of `size` MiB in (needs `hotplugMemory`). */
  async plugMemory(id: string, size: number): Promise<void> {
    const backend = `${id}-backend`;
    await this.qmp.execute("object-add", {
      "qom-type": "memory-backend-memfd",
      id: backend,
      size: size * 2 ** 20,
      share: true,
    });
    await this.qmp.execute("device_add", { driver: "pc-dimm", id, memdev: backend });
  }

  /** kill -9, as a VMM that crashes. */
  async kill(): Promise<void> {
    await this.qemu.kill();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.kill();
    this.qmp[Symbol.dispose]();
  }

  private get program(): Qemu {
    return this.options.qemu ?? SYSTEM_QEMU;
  }

  private commandLine(): string[] {
    const { name, directory, accelerator, processors = 1, memory = 256, hotplugMemory = 0 } = this.options;
    const { reconnect } = this.program;
    const slots = hotplugMemory === 0 ? "" : `,slots=4,maxmem=${memory + hotplugMemory}M`;
    return [
      ...["-name", name, "-nodefaults", "-no-user-config", "-display", "none"],
      ...["-M", "q35,memory-backend=memory", "-smp", `${processors}`, "-m", `${memory}M${slots}`],
      ...["-object", `memory-backend-memfd,id=memory,size=${memory}M,share=on`],
      ...(accelerator === "kvm" ? ["-accel", "kvm", "-cpu", "host"] : ["-accel", "tcg,thread=multi", "-cpu", "max"]),
      ...["-qmp", `unix:${join(directory, `${name}.qmp`)}`, "-serial", `file:${this.consolePath}`],
      ...(this.options.disks ?? []).flatMap((disk, index) => diskArguments(disk, index, reconnect)),
      ...(this.options.nics ?? []).flatMap((nic, index) => nicArguments(nic, index, reconnect)),
      ...(this.options.arguments ?? []),
    ];
  }
}

function diskArguments(
  { socket, queues, role, pagePerVq = true }: VhostDisk,
  index: number,
  reconnect: string,
): string[] {
  return [
    ...["-chardev", `socket,id=disk${index},path=${socket},${manner(role, reconnect)}`],
    "-device",
    `vhost-user-blk-pci,chardev=disk${index},num-queues=${queues},page-per-vq=${pagePerVq ? "on" : "off"},disable-legacy=on,disable-modern=off,bootindex=${index + 1}`,
  ];
}

function nicArguments(
  { socket, pairs, mac, role, mtu, bootable = false }: VhostNic,
  index: number,
  reconnect: string,
): string[] {
  const properties = [
    ...[`netdev=nic${index}`, `mac=${mac}`, "mq=on", `vectors=${2 * pairs + 2}`, "disable-legacy=on"],
    ...(mtu === undefined ? [] : [`host_mtu=${mtu}`]),
    bootable ? `bootindex=${index + 1}` : "romfile=",
  ];
  return [
    ...["-chardev", `socket,id=nic${index}-socket,path=${socket},${manner(role, reconnect)}`],
    ...["-netdev", `vhost-user,id=nic${index},chardev=nic${index}-socket,queues=${pairs}`],
    ...["-device", `virtio-net-pci,${properties.join(",")}`],
  ];
}

function manner(role: SocketRole | undefined, reconnect: string): string {
  return role === "connect" ? reconnect : "server=on,wait=off";
}
