import { mkdir, writeFile } from "node:fs/promises";
import { join } from "node:path";
import type { NetworkNamespace } from "../network-namespace.ts";
import { all } from "./all.ts";
import { Stack } from "./stack.ts";
import type { SocketRole, VmOptions } from "./vm.ts";

/** The guest's disk and network card as a host has them; a host may be without either. */
export interface HostDevices {
  /** Queues of the disk. */
  readonly blk?: number;
  /** Pairs of queues of the card. */
  readonly net?: number;
  /** Whose the sockets are; "qemu" unless said. */
  readonly listener?: "qemu" | "daemon";
  /** More options of the PF of that class, as in vfe-softvf's configuration. */
  readonly options?: Readonly<Partial<Record<"blk" | "net", Readonly<Record<string, string | number | boolean>>>>>;
}

export interface HostPlace {
  readonly directory: string;
  readonly namespace: NetworkNamespace;
  /** Image on the storage that hosts share. */
  readonly disk: string;
  /** Interface of the namespace. */
  readonly tap: string;
  readonly mac: string;
}

type DeviceName = "blk" | "net";

/** The first one is what `Stack` knows of. */
const PFS = ["0000:5a:00.0", "0000:5b:00.0"] as const;
const VM = "6f3c1d2e-8f4b-4c5d-9e6f-7a8b9c0d1e2f";

interface HostDevice {
  readonly name: DeviceName;
  readonly pf: string;
  readonly vf: string;
  readonly socket: string;
}

/** A host that VMs can be moved to and from: one vfe-softvf with a PF for each device class, and one daemon. */
export class MigrationHost implements AsyncDisposable {
  private constructor(
    readonly place: HostPlace,
    readonly stack: Stack,
    private readonly devices: readonly HostDevice[],
    private readonly listener: HostDevices["listener"],
  ) {}

  /** Starts both processes; the VFs wait for a VMM. */
  static async start(place: HostPlace, counts: HostDevices): Promise<MigrationHost> {
    const { directory } = place;
    await mkdir(directory, { recursive: true });
    const names = (["blk", "net"] as const).filter((name) => counts[name] !== undefined);
    const devices = names.map((name, index) => ({
      name,
      pf: PFS[index]!,
      vf: PFS[index]!.replace(/0$/, "1"),
      socket: join(directory, `${name}.sock`),
    }));
    const config = join(directory, "softvf.toml");
    await writeFile(config, devices.map(({ name, pf }) => section(name, pf, place, counts)).join("\n"));
    const stack = await Stack.start({ directory, config, prefix: place.namespace.prefix });
    const host = new MigrationHost(place, stack, devices, counts.listener);
    try {
      await host.startDaemon();
    } catch (error) {
      await host[Symbol.asyncDispose]();
      throw error;
    }
    return host;
  }

  /** Starts the daemon, or the next one, and gives it the VFs. */
  async startDaemon(): Promise<void> {
    await this.stack.startDaemon();
    await all(this.devices.map(({ name }) => this.add(name)));
  }

  /** Takes a PF and its VF away and gives them back, with whatever VM is using it. */
  async renew(name: DeviceName): Promise<void> {
    const { pf, vf } = this.device(name);
    await this.stack.command("vf", "-r", vf);
    await this.stack.command("mgmtpf", "-r", pf);
    await this.add(name);
  }

  /** kill -9. */
  async killDaemon(): Promise<void> {
    await this.stack.daemon.kill();
  }

  /** Changes properties of a PF while it runs. */
  async setPf(name: DeviceName, ...properties: string[]): Promise<void> {
    await this.stack.set(this.device(name).pf, properties);
  }

  /** What `vf -i` says of the VF. */
  vfInfo(name: DeviceName): Promise<Readonly<Record<string, unknown>>> {
    return this.stack.vfInfo(this.device(name).vf);
  }

  /** What a VM on this host has for its disk and its card. @param counts of the VM's own queues */
  vmDevices({ blk, net }: HostDevices): Pick<VmOptions, "disks" | "nics"> {
    const role: SocketRole = this.listener === "daemon" ? "connect" : "listen";
    const { mac } = this.place;
    return {
      ...(blk === undefined ? {} : { disks: [{ socket: this.device("blk").socket, queues: blk, role }] }),
      ...(net === undefined ? {} : { nics: [{ socket: this.device("net").socket, pairs: net, mac, role }] }),
    };
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.stack[Symbol.asyncDispose]();
  }

  private async add(name: DeviceName): Promise<void> {
    const { pf, vf, socket } = this.device(name);
    await this.stack.command("mgmtpf", "-a", pf);
    const more = this.listener === "daemon" ? ["--server"] : [];
    await this.stack.command("vf", "-a", vf, "-v", socket, "-u", VM, ...more);
  }

  private device(wanted: DeviceName): HostDevice {
    const found = this.devices.find(({ name }) => name === wanted);
    if (found === undefined) throw new Error(`this host has no ${wanted}`);
    return found;
  }
}

/** A PF in vfe-softvf's configuration. */
function section(name: DeviceName, address: string, { disk, tap, mac }: HostPlace, counts: HostDevices): string {
  const own = name === "blk" ? { disk } : { backend: "tap", tap, mac };
  const options = { address, class: name, vfs: 1, queues: counts[name] ?? 1, ...own, ...counts.options?.[name] };
  const lines = Object.entries(options).map(([key, value]) => `${key} = ${JSON.stringify(value)}`);
  return ["[[pf]]", ...lines, ""].join("\n");
}
