import { mkdir, mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { Deadline } from "../../../src/base/deadline.ts";
import { NetworkNamespace } from "../network-namespace.ts";
import { type Accelerator, findAccelerator } from "./accelerator.ts";
import { all } from "./all.ts";
import { Guest } from "./guest.ts";
import { buildGuestImage, type GuestImage } from "./image.ts";
import { LanServices } from "./lan-services.ts";
import { type Migration, Stack } from "./stack.ts";
import type { SocketRole, VmOptions } from "./vm.ts";

export interface NetLabOptions {
  /** Of queues, of each VF and of QEMU's cards; or of the VFs of each PF. */
  readonly pairs?: number | Readonly<Record<Migration, number>>;
  /** Of the TAPs and VFs, bytes. */
  readonly mtu?: number;
  /** QEMU tells the guest and the back-end of that MTU. */
  readonly announceMtu?: boolean;
  /** Who listens on the vhost-user sockets: QEMU unless said. */
  readonly listener?: "qemu" | "daemon";
  /** One software PF with its daemon for each; both unless said. */
  readonly migrations?: readonly Migration[];
  /** VFs of each PF, all of them cards of the same VM; 1 unless said. */
  readonly vfs?: number;
}

/** A VF with a TAP behind it in the lab's network namespace, and the guest's card in front. Each is a subnet of its own. */
export interface LabNic {
  readonly migration: Migration;
  readonly pairs: number;
  readonly stack: Stack;
  /** Address of the VF. */
  readonly vf: string;
  /** vhost-user socket. */
  readonly socket: string;
  /** As the guest calls it: eth0. */
  readonly device: string;
  readonly mac: string;
  /** In the namespace. */
  readonly tap: string;
  readonly hostAddress: string;
  readonly guestAddress: string;
}

/** Network cards, and VMs that use all of them, one VM after the other. */
export class NetLab implements AsyncDisposable {
  private readonly machines: AsyncDisposable[] = [];
  private started = 0;

  private constructor(
    private readonly options: Required<NetLabOptions>,
    readonly directory: string,
    readonly image: GuestImage,
    private readonly accelerator: Accelerator,
    readonly namespace: NetworkNamespace,
    /** What the guest finds in the networks behind its cards. */
    readonly services: LanServices,
    /** In the order of `migrations`, the VFs of one PF side by side. */
    readonly nics: readonly LabNic[],
  ) {}

  /** Starts everything but VMs: the VFs wait for their front-ends. */
  static async create(given: NetLabOptions = {}): Promise<NetLab> {
    const options = {
      pairs: 1,
      mtu: 1500,
      announceMtu: false,
      listener: "qemu",
      migrations: ["none", "vendor"],
      vfs: 1,
      ...given,
    } as const;
    const image = await buildGuestImage();
    const accelerator = await findAccelerator(image);
    const directory = await mkdtemp(join(tmpdir(), "net-"));
    await using undo = new AsyncDisposableStack();
    undo.defer(() => rm(directory, { recursive: true, force: true }));
    const namespace = undo.use(await NetworkNamespace.create(directory));
    const pfs = options.migrations.map(async (migration, index) => {
      const nics = await makeNics(directory, namespace, { migration, index, ...options });
      undo.use(nics[0]!.stack);
      return nics;
    });
    const nics = (await all(pfs)).flat();
    const services = undo.use(await LanServices.start(namespace, image.busybox, directory));
    const lab = new NetLab(options, directory, image, accelerator, namespace, services, nics);
    await all(lab.stacks.map((stack) => stack.startDaemon()));
    await all(lab.stacks.map((stack) => stack.command("mgmtpf", "-a", stack.pf)));
    await all(nics.map((nic) => lab.addVf(nic)));
    undo.move();
    return lab;
  }

  /** The card of this kind; the first one. @throws Error where there is none */
  nic(migration: Migration): LabNic {
    const found = this.nics.find((nic) => nic.migration === migration);
    if (found === undefined) throw new Error(`this lab has no card with migration ${migration}`);
    return found;
  }

  /** Gives a VF to the daemon, which serves it at the card's socket. */
  async addVf({ stack, vf, socket }: LabNic): Promise<void> {
    const more = this.options.listener === "daemon" ? ["--server"] : [];
    await stack.command("vf", "-a", vf, "-v", socket, ...more);
  }

  /** Takes the VF of a card away and gives it back, with whatever VM is using it. */
  async renewVf(nic: LabNic): Promise<void> {
    await nic.stack.command("vf", "-r", nic.vf);
    await this.addVf(nic);
  }

  /** Starts a Linux guest and waits until it takes commands. Its interfaces are down. */
  async bootGuest(options: Partial<Pick<VmOptions, "processors" | "memory">> = {}): Promise<Guest> {
    const guest = await Guest.start({ ...this.vmOptions("linux"), ...options, image: this.image });
    this.machines.push(guest);
    await guest.booted(1);
    return guest;
  }

  /** What a VM of this lab is made of, under a name of its own. */
  vmOptions(kind: string): VmOptions {
    const { listener, mtu, announceMtu } = this.options;
    const role: SocketRole = listener === "qemu" ? "listen" : "connect";
    return {
      directory: this.directory,
      name: `${kind}${this.started++}`,
      accelerator: this.accelerator,
      nics: this.nics.map(({ socket, mac, pairs }) => ({
        ...{ socket, mac, pairs, role },
        ...(announceMtu ? { mtu } : {}),
      })),
    };
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const machine of this.machines.reverse()) await machine[Symbol.asyncDispose]();
    await this.services[Symbol.asyncDispose]();
    await Promise.all(this.stacks.map((stack) => stack[Symbol.asyncDispose]()));
    await this.namespace[Symbol.asyncDispose]();
    await rm(this.directory, { recursive: true, force: true });
  }

  private get stacks(): Stack[] {
    return [...new Set(this.nics.map(({ stack }) => stack))];
  }
}

/** Gives the guest's cards their addresses and an MTU. */
export async function configure(guest: Guest, nics: readonly LabNic[], mtu = 1500): Promise<void> {
  for (const { device, guestAddress } of nics) {
    await guest.run(`ip link set ${device} mtu ${mtu} up && ip address add ${guestAddress}/24 dev ${device}`);
  }
}

/** Waits until the guest sees its link as said. */
export async function awaitLink(guest: Guest, { device }: LabNic, up: boolean, timeout = 10_000): Promise<void> {
  const wanted = up ? "1" : "0";
  await Deadline.after(timeout, `carrier ${wanted} at ${device} of the guest`).poll(
    async () => (await guest.run(`cat /sys/class/net/${device}/carrier`)) === wanted || undefined,
    20,
  );
}

/** What the daemon says of each of the VF's queues. */
export interface QueueCounts {
  readonly queue: number;
  readonly received: number;
  readonly completed: number;
  readonly bad: number;
  readonly bytes: number;
}

export async function queueCounts({ stack, vf }: Pick<LabNic, "stack" | "vf">): Promise<readonly QueueCounts[]> {
  const { queue_stats } = await stack.vfInfo(vf);
  return queue_stats as QueueCounts[];
}

interface PfOptions extends Required<NetLabOptions> {
  readonly migration: Migration;
  readonly index: number;
}

/** One PF with a TAP behind each of its VFs. */
async function makeNics(
  parent: string,
  namespace: NetworkNamespace,
  { migration, index, vfs, mtu, ...options }: PfOptions,
): Promise<LabNic[]> {
  const directory = join(parent, `${index}`);
  await mkdir(directory);
  const pairs = typeof options.pairs === "number" ? options.pairs : options.pairs[migration];
  const places = Array.from({ length: vfs }, (_, vf) => {
    const number = index * vfs + vf;
    return {
      socket: join(directory, `vhost${vf}.sock`),
      device: `eth${number}`,
      mac: `02:00:00:00:0${index}:0${vf}`,
      tap: `tap${index}-${vf}`,
      hostAddress: `10.0.${number}.1`,
      guestAddress: `10.0.${number}.2`,
    };
  });
  for (const { tap, hostAddress } of places) await namespace.addTap(tap, { address: `${hostAddress}/24`, mtu });
  const stack = await Stack.start({
    ...{ directory, deviceClass: "net", vfs, queues: pairs, migration, prefix: namespace.prefix },
    softvf: [
      ...["--backend", "tap", "--tap", `tap${index}-{vf}`],
      ...["--mac", `02:00:00:00:0${index}:00+{vf}`, "--mtu", `${mtu}`],
    ],
  });
  return places.map((place, vf) => ({ ...place, migration, pairs, stack, vf: stack.vfAddress(vf) }));
}
