import { mkdir, open, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { Deadline } from "../../../src/base/deadline.ts";
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
  /**
   * vfe-vhostd-ha keeps what the daemon has. PFs and VFs are in the daemon's configuration: one that finds nothing kept adds
   * them.
   */
  readonly keeper?: true;
  /** A VF that no VM has, a disk of its own; the daemon listens at `victimSocket`. Needs `keeper`. */
  readonly victim?: true;
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

type DeviceName = "blk" | "net" | "victim";

/** The first one is what `Stack` knows of. */
const PFS = ["0000:5a:00.0", "0000:5b:00.0", "0000:5c:00.0"] as const;
const VM = "6f3c1d2e-8f4b-4c5d-9e6f-7a8b9c0d1e2f";
export const VICTIM_QUEUES = 4;
/** It takes the victim's next connection at once. */
const IMPATIENT = "test/kit/fuzz/impatient-daemon.ts";
const VICTIM_DISK = 8 << 20;
/** Milliseconds for a daemon to have taken up everything, or added it. */
const TAKE_UP_TIMEOUT = 30_000;
const LOOK_INTERVAL = 20;

/** What the daemon says of a VF, as far as it matters here. */
interface ListedVf {
  readonly vf: string;
  readonly state: string;
  readonly connected: boolean;
}

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
    private readonly options: HostDevices,
  ) {}

  /** Starts both processes; the VFs wait for a VMM. */
  static async start(place: HostPlace, counts: HostDevices): Promise<MigrationHost> {
    const { directory } = place;
    await mkdir(directory, { recursive: true });
    const names = (["blk", "net", "victim"] as const).filter((name) => counts[name] !== undefined);
    const devices = names.map((name, index) => ({
      name,
      pf: PFS[index]!,
      vf: PFS[index]!.replace(/0$/, "1"),
      socket: join(directory, `${name}.sock`),
    }));
    const config = join(directory, "softvf.toml");
    await writeFile(config, devices.map(({ name, pf }) => section(name, pf, place, counts)).join("\n"));
    const daemonConfig = join(directory, "vhostd.toml");
    if (counts.keeper) await writeFile(daemonConfig, devices.map((device) => ofDaemon(device, counts)).join("\n"));
    if (counts.victim) await makeVictimDisk(directory);
    const stack = await Stack.start({
      ...{ directory, config, prefix: place.namespace.prefix },
      ...(counts.keeper ? { daemonConfig } : {}),
      ...(counts.victim ? { daemonProgram: IMPATIENT } : {}),
    });
    const host = new MigrationHost(place, stack, devices, counts);
    try {
      if (counts.keeper) await stack.startKeeper();
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
    if (this.options.keeper) await this.takenUp();
    else await all(this.devices.map(({ name }) => this.add(name)));
  }

  /** Takes a PF and its VF away and gives them back, with whatever VM is using it. */
  async renew(name: DeviceName): Promise<void> {
    const { pf, vf } = this.device(name);
    await this.stack.command("vf", "-r", vf);
    await this.stack.command("mgmtpf", "-r", pf);
    await this.add(name);
  }

  /**
   * Waits until the daemon has all VFs, and the keeper all that it has.
   * @param sessions how many of them a VMM must be connected to
   * @throws Error with what the last daemons wrote
   */
  async takenUp(sessions = 0): Promise<void> {
    const { stack, devices } = this;
    await stack.daemonReady();
    let seen = "nothing";
    const deadline = Deadline.after(TAKE_UP_TIMEOUT, "taking up all VFs");
    try {
      await deadline.poll(async () => {
        const { vfs } = await stack.call<{ vfs: readonly ListedVf[] }>("vf.list");
        const stats = await stack.call<{ protected: boolean }>("stats");
        seen = JSON.stringify({ vfs: vfs.map(({ vf, state, connected }) => ({ vf, state, connected })), ...stats });
        const served = vfs.filter(({ vf, connected }) => connected && this.sockets.has(vf)).length;
        return (vfs.length === devices.length && served >= sessions && stats.protected) || undefined;
      }, LOOK_INTERVAL);
    } catch (error) {
      throw new Error(`${error}: ${seen}\n${stack.story}`, { cause: error });
    }
  }

  get victimSocket(): string {
    return this.device("victim").socket;
  }

  /** vhost-user sockets of the VM, by the address of the VF. */
  get sockets(): ReadonlyMap<string, string> {
    const ofVm = this.devices.filter(({ name }) => name !== "victim");
    return new Map(ofVm.map(({ vf, socket }) => [vf, socket]));
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
    const role: SocketRole = this.options.listener === "daemon" ? "connect" : "listen";
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
    const more = this.options.listener === "daemon" ? ["--server"] : [];
    await this.stack.command("vf", "-a", vf, "-v", socket, "-u", VM, ...more);
  }

  private device(wanted: DeviceName): HostDevice {
    const found = this.devices.find(({ name }) => name === wanted);
    if (found === undefined) throw new Error(`this host has no ${wanted}`);
    return found;
  }
}

/** A PF in vfe-softvf's configuration. */
function section(
  name: DeviceName,
  address: string,
  { directory, disk, tap, mac }: HostPlace,
  counts: HostDevices,
): string {
  const own = {
    blk: { class: "blk", queues: counts.blk ?? 1, disk, ...counts.options?.blk },
    net: { class: "net", queues: counts.net ?? 1, backend: "tap", tap, mac, ...counts.options?.net },
    victim: { class: "blk", queues: VICTIM_QUEUES, disk: victimDisk(directory) },
  } as const;
  return table("pf", { address, vfs: 1, ...own[name] });
}

/** A PF and its VF in vfe-vhostd's configuration. */
function ofDaemon({ name, pf, vf, socket }: HostDevice, { listener }: HostDevices): string {
  const mode = listener === "daemon" || name === "victim" ? "server" : "client";
  const vm = name === "victim" ? {} : { uuid: VM };
  return table("pf", { device: pf }) + table("vf", { device: vf, socket, mode, ...vm });
}

function table(name: string, values: Readonly<Record<string, string | number | boolean>>): string {
  const lines = Object.entries(values).map(([key, value]) => `${key} = ${JSON.stringify(value)}`);
  return [`[[${name}]]`, ...lines, ""].join("\n");
}

function victimDisk(directory: string): string {
  return join(directory, "victim.img");
}

async function makeVictimDisk(directory: string): Promise<void> {
  await using file = await open(victimDisk(directory), "w");
  await file.truncate(VICTIM_DISK);
}
