import { mkdtemp, open, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { bringNewerQemu, type Qemu, SYSTEM_QEMU } from "../machine/qemu.ts";
import { NetworkNamespace } from "../network-namespace.ts";
import { type Accelerator, findAccelerator } from "./accelerator.ts";
import { all } from "./all.ts";
import { Guest } from "./guest.ts";
import { buildGuestLoad, withGuestLoad } from "./guest-load.ts";
import { buildGuestImage, type GuestImage } from "./image.ts";
import { Migration, type MigrationStatus } from "./migration.ts";
import { type HostDevices, type HostPlace, MigrationHost } from "./migration-host.ts";

export interface MigrationLabOptions extends HostDevices {
  /** MiB. */
  readonly diskSize?: number;
  /** Of the second host, where it is not as the first. */
  readonly other?: HostDevices;
  /** The VM arrives, and is to be what it was; unless said it only sets off. */
  readonly arrives?: true;
}

/** The network behind the guest's card, which is the same at both hosts: a bridge. */
export const BRIDGE = "bridge";
export const OUTSIDE_ADDRESS = "10.0.0.1";
export const GUEST_ADDRESS = "10.0.0.2";
const [OUTSIDE_MAC, MAC] = ["02:00:00:00:00:01", "02:00:00:00:00:10"] as const;
/** MiB: what the guest's kernel and the loads need, no more, because each migration copies it. */
const MEMORY = 192;

/** Two hosts with storage and a network that they share, and one VM that is moved between them. */
export class MigrationLab implements AsyncDisposable {
  private readonly machines = new Set<Guest>();
  private running: Guest | undefined;
  private started = 0;
  private migrations = 0;
  private replaced = 0;
  /** Which host the VM runs on. */
  place: 0 | 1 = 0;

  private constructor(
    private readonly options: MigrationLabOptions,
    readonly directory: string,
    private readonly image: GuestImage,
    private readonly accelerator: Accelerator,
    private readonly qemu: Qemu,
    readonly namespace: NetworkNamespace,
    readonly disk: string,
    /** guest-load, for this machine. */
    readonly loadProgram: string,
    private readonly hosts: [MigrationHost, MigrationHost],
  ) {}

  /** Starts everything but VMs. */
  static async create(options: MigrationLabOptions): Promise<MigrationLab> {
    const plain = await buildGuestImage();
    const accelerator = await findAccelerator(plain);
    const qemu = options.arrives ? await completeQemu(accelerator) : SYSTEM_QEMU;
    const directory = await mkdtemp(join(tmpdir(), "move-"));
    await using undo = new AsyncDisposableStack();
    undo.defer(() => rm(directory, { recursive: true, force: true }));
    const program = await buildGuestLoad(directory);
    const image = await withGuestLoad(plain, program, directory);
    const disk = join(directory, "disk.img");
    await using file = await open(disk, "w");
    await file.truncate((options.diskSize ?? 32) * 2 ** 20);
    const namespace = undo.use(await NetworkNamespace.create(directory));
    await makeNetwork(namespace);
    const places = [0, 1].map((index) => placeOf(index, directory, namespace, disk));
    const hosts = await all(
      places.map(async (place, index) => {
        const host = await MigrationHost.start(place, index === 1 ? (options.other ?? options) : options);
        return undo.use(host);
      }),
    );
    undo.move();
    return new MigrationLab(options, directory, image, accelerator, qemu, namespace, disk, program, [
      hosts[0]!,
      hosts[1]!,
    ]);
  }

  /** Where the VM runs. */
  get source(): MigrationHost {
    return this.hosts[this.place];
  }

  /** Where it would be moved to. */
  get destination(): MigrationHost {
    return this.hosts[this.otherPlace];
  }

  /** The VM, wherever it is. */
  get guest(): Guest {
    if (this.running === undefined) throw new Error("there is no VM");
    return this.running;
  }

  /** Starts the VM on the first host and waits until it takes commands; its card has its address then. */
  async boot(): Promise<Guest> {
    const guest = await this.startGuest(this.source);
    await guest.booted(1);
    this.running = guest;
    await this.giveAddress();
    return guest;
  }

  /** Resets the VM and waits until it takes commands again; its card has its address then. */
  async reset(): Promise<void> {
    const boots = this.guest.bootCount;
    await this.guest.vm.qmp.execute("system_reset");
    await this.guest.booted(boots + 1);
    await this.giveAddress();
  }

  /** Starts a QEMU at the destination that waits for the VM. @param more arguments of QEMU */
  async awaitAt(host: MigrationHost = this.destination, more: readonly string[] = []): Promise<Guest> {
    return await this.startGuest(host, ["-incoming", "defer", ...more]);
  }

  /** Begins to move the VM to a QEMU that waits. */
  async begin(destination: Guest, speed: "slow" | "usual" = "usual"): Promise<Migration> {
    const path = join(this.directory, `migration${this.migrations++}`);
    return await Migration.begin(this.guest.vm.qmp, destination.vm.qmp, path, speed);
  }

  /** Moves the running VM to the other host, in at least three passes. */
  async migrate(): Promise<MigrationStatus> {
    const destination = await this.awaitAt();
    const migration = await this.begin(destination);
    await migration.passed();
    const ended = await migration.complete();
    await this.arrived(destination);
    return ended;
  }

  /** The VM runs at the destination from now on: the QEMU at the source is ended. */
  async arrived(destination: Guest): Promise<void> {
    const left = this.guest;
    this.running = destination;
    this.place = this.otherPlace;
    await this.discard(left);
  }

  /** Ends a QEMU. */
  async discard(guest: Guest): Promise<void> {
    this.machines.delete(guest);
    await guest[Symbol.asyncDispose]();
  }

  /** Puts another host in the place of the destination. */
  async replaceDestination(devices: HostDevices): Promise<void> {
    const { place } = this.destination;
    await this.destination[Symbol.asyncDispose]();
    const directory = join(this.directory, `other${this.replaced++}`);
    this.hosts[this.otherPlace] = await MigrationHost.start({ ...place, directory }, devices);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const machine of this.machines) await machine[Symbol.asyncDispose]();
    await Promise.all(this.hosts.map((host) => host[Symbol.asyncDispose]()));
    await this.namespace[Symbol.asyncDispose]();
    await rm(this.directory, { recursive: true, force: true });
  }

  private async giveAddress(): Promise<void> {
    if (this.options.net === undefined) return;
    // What waits for an answer to ARP is sent later than what comes after it.
    await this.guest.run(`ip link set eth0 up && ip address add ${GUEST_ADDRESS}/24 dev eth0
      arp -i eth0 -s ${OUTSIDE_ADDRESS} ${OUTSIDE_MAC}`);
  }

  private get otherPlace(): 0 | 1 {
    return this.place === 0 ? 1 : 0;
  }

  /** QEMU's devices are those of the first host, wherever it runs: a VM is the same everywhere. */
  private async startGuest(host: MigrationHost, more: readonly string[] = []): Promise<Guest> {
    const { blk = 1, net = 1 } = this.options;
    const guest = await Guest.start({
      directory: this.directory,
      name: `linux${this.started++}`,
      accelerator: this.accelerator,
      qemu: this.qemu,
      image: this.image,
      processors: Math.max(blk, net),
      memory: MEMORY,
      ...host.vmDevices(this.options),
      arguments: more,
    });
    this.machines.add(guest);
    return guest;
  }
}

/**
 * A QEMU that copies all that the VM's processors write. One before 9.0 (Debian 12 has 7.2) does not where it emulates them:
 * what they write just after it has read its map of dirty pages is lost, whatever devices there are.
 */
async function completeQemu(accelerator: Accelerator): Promise<Qemu> {
  return accelerator === "kvm" ? SYSTEM_QEMU : await bringNewerQemu();
}

/** Why no VM can be moved here so that it arrives, for the names of tests that are skipped; undefined where it can. */
export async function whyNoneArrives(): Promise<string | undefined> {
  const accelerator = await findAccelerator(await buildGuestImage());
  return await completeQemu(accelerator).then(
    () => undefined,
    (error) => `QEMU 9.0 or newer cannot be had: ${`${error}`.split("\n")[0]!.replaceAll("]", ")")}`,
  );
}

function placeOf(index: number, parent: string, namespace: NetworkNamespace, disk: string): HostPlace {
  return { directory: join(parent, `host${index}`), namespace, disk, tap: tapOf(index), mac: MAC };
}

function tapOf(index: number): string {
  return `tap${index}`;
}

/** A bridge with a TAP for each host's VF, and this machine as the guest's peer. */
async function makeNetwork(namespace: NetworkNamespace): Promise<void> {
  const link = ["link", "add", BRIDGE, "address", OUTSIDE_MAC, "type", "bridge"];
  await namespace.run("ip", ...link, "forward_delay", "0", "mcast_snooping", "0");
  await namespace.run("ip", "address", "add", `${OUTSIDE_ADDRESS}/24`, "dev", BRIDGE);
  await namespace.run("ip", "link", "set", BRIDGE, "up");
  await namespace.run("ip", "neighbour", "add", GUEST_ADDRESS, "lladdr", MAC, "dev", BRIDGE);
  for (const index of [0, 1]) {
    await namespace.addTap(tapOf(index));
    await namespace.run("ip", "link", "set", tapOf(index), "master", BRIDGE);
  }
}
