import { Deadline } from "../../../src/base/deadline.ts";
import { finished, GuestPlace, type LoadPlace, LocalPlace, type TaskStatus } from "./guest-load.ts";
import {
  BRIDGE,
  GUEST_ADDRESS,
  type MigrationLab,
  type MigrationLabOptions,
  OUTSIDE_ADDRESS,
} from "./migration-lab.ts";

const PROGRESS_TIMEOUT = 60_000;
const LOOK_INTERVAL = 100;
/** Of the task in memory: half a second and more. */
const GUEST_ROUNDS = 1000;
/** Tasks that do nothing more where no device does. A sender goes on as long as something takes what it sends. */
const NEED_DEVICE = /^disk|-receive/;
/** MiB of pages that are changed and verified. */
const MEMORY = 8;
/** Microseconds between two datagrams. */
const PACE = 2000;
/** KiB a second, in each direction. */
const RATE = 2048;
const PORTS = { toGuest: "5001", toOutside: "5002" } as const;

/** What a VM did while it was moved. */
export interface WorkDone {
  readonly diskRounds: number;
  readonly memoryRounds: number;
  readonly tcpBytes: number;
  /** Of both directions. */
  readonly datagrams: number;
  readonly lostDatagrams: number;
  /** The longest row of datagrams that were lost. */
  readonly longestLoss: number;
}

interface Tasks {
  readonly guest: readonly string[];
  readonly outside: readonly string[];
}

/** Verified work in a VM, and with it over the network, that goes on wherever the VM is. */
export class MigrationWork implements AsyncDisposable {
  private readonly inside: GuestPlace;
  private readonly outside: LocalPlace;
  private readonly tasks: Tasks;

  private constructor(
    private readonly lab: MigrationLab,
    private readonly devices: MigrationLabOptions,
  ) {
    this.inside = new GuestPlace(() => lab.guest);
    this.outside = new LocalPlace(lab.loadProgram, lab.directory, lab.namespace.prefix);
    const net = devices.net !== undefined;
    this.tasks = {
      guest: [
        "memory",
        ...(devices.blk === undefined ? [] : ["disk"]),
        ...(net ? ["udp-receive", "tcp-receive", "udp-send", "tcp-send"] : []),
      ],
      outside: net ? ["announcements", "udp-receive", "tcp-receive", "udp-send", "tcp-send"] : [],
    };
  }

  /** @param devices of the lab */
  static async start(lab: MigrationLab, devices: MigrationLabOptions): Promise<MigrationWork> {
    const work = new MigrationWork(lab, devices);
    try {
      for (const task of work.tasks.guest) await work.inside.start(task, words(task, devices, "guest"));
      for (const task of work.tasks.outside) await work.outside.start(task, words(task, devices, "outside"));
      await work.progress();
    } catch (error) {
      await work[Symbol.asyncDispose]();
      throw error;
    }
    return work;
  }

  /** Waits until every task has done some more, from now on. @throws Error where one found something wrong, or stands */
  async progress(timeout = PROGRESS_TIMEOUT): Promise<void> {
    const before = await this.counts();
    let standing = "";
    const deadline = Deadline.after(timeout, "progress of all work");
    try {
      await deadline.poll(async () => {
        const now = await this.counts();
        const stuck = now.filter(({ count }, index) => count <= before[index]!.count + 1);
        standing = stuck.map(({ task, count }) => `${task} at ${count}`).join(", ");
        return stuck.length === 0 || undefined;
      }, LOOK_INTERVAL);
    } catch (error) {
      throw deadline.expired ? new Error(`no progress: ${standing}`, { cause: error }) : error;
    }
  }

  /**
   * Waits while the guest runs, and its devices are to stand.
   * @throws Error where one of them did something, or the guest stands, too
   */
  async devicesStand(timeout = PROGRESS_TIMEOUT): Promise<void> {
    const memory = async () => (await this.inside.statuses(["memory"]))[0]!.count("rounds");
    const deadline = Deadline.after(timeout, "the guest's own work");
    const guestRuns = async () => {
      const before = await memory();
      await deadline.poll(async () => (await memory()) > before + GUEST_ROUNDS || undefined, LOOK_INTERVAL);
    };
    // What the devices did while they were there is told a little later.
    await guestRuns();
    const before = await this.counts();
    await guestRuns();
    const now = await this.counts();
    const moved = now.filter(({ task, count }, index) => NEED_DEVICE.test(task) && count !== before[index]!.count);
    if (moved.length > 0) throw new Error(`with no device: ${moved.map(({ task }) => task).join(", ")}`);
  }

  /** Frames with which the guest, or its host, has said where it is; none where it has no card. */
  async announcements(): Promise<{ readonly arp: number; readonly rarp: number }> {
    const watching = this.tasks.outside.filter((task) => task === "announcements");
    const [status] = await this.outside.statuses(watching);
    return { arp: status?.count("arp") ?? 0, rarp: status?.count("rarp") ?? 0 };
  }

  /** Ends all work and verifies everything once more, the disk's image too. @throws Error where something is wrong */
  async stop(): Promise<WorkDone> {
    const { inside, outside, devices, lab } = this;
    const net = devices.net !== undefined;
    if (net) {
      await end(inside, ["udp-send", "tcp-send"]);
      await end(outside, ["udp-send", "tcp-send"]);
    }
    const receivers = ["udp-receive", "tcp-receive"];
    const insideReceived = net ? await end(inside, receivers) : [];
    const outsideReceived = net ? await end(outside, [...receivers, "announcements"]) : [];
    const sent = net ? [...(await inside.statuses(["udp-send"])), ...(await outside.statuses(["udp-send"]))] : [];
    const [memory] = await end(inside, ["memory"]);
    const [disk] = devices.blk === undefined ? [] : await end(inside, ["disk"]);
    if (disk !== undefined) {
      await outside.start("disk-check", ["disk-check", lab.disk]);
      const [image] = await finished(outside, ["disk-check"]);
      const sums = [disk, image].map((status) => /checksum (\S+)/.exec(status?.text ?? "")?.[1]);
      if (sums[0] !== sums[1]) throw new Error(`the image is not what the guest wrote: ${sums.join(", ")}`);
    }
    const received = [...insideReceived, ...outsideReceived];
    const sum = (statuses: readonly (TaskStatus | undefined)[], name: string) =>
      statuses.reduce((total, status) => total + (status?.count(name) ?? 0), 0);
    for (const wrong of ["twice", "late", "wrong"]) {
      const count = sum(received, wrong);
      if (count > 0)
        throw new Error(`${count} datagrams were ${wrong}: ${received.map(({ text }) => text).join("; ")}`);
    }
    return {
      diskRounds: disk?.count("rounds") ?? 0,
      memoryRounds: memory?.count("rounds") ?? 0,
      tcpBytes: sum(received, "bytes"),
      datagrams: sum(sent, "sent"),
      lostDatagrams: sum(sent, "sent") - sum(received, "received"),
      longestLoss: Math.max(0, ...received.map((status) => status.count("hole"))),
    };
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.outside[Symbol.asyncDispose]();
  }

  private async counts(): Promise<{ readonly task: string; readonly count: number }[]> {
    const { guest, outside } = this.tasks;
    const counted = outside.filter((task) => task !== "announcements");
    const statuses = [...(await this.inside.statuses(guest)), ...(await this.outside.statuses(counted))];
    const names = [...guest.map((task) => `${task} in the guest`), ...counted.map((task) => `${task} outside`)];
    return names.map((task, index) => ({ task, count: progressOf(statuses[index]!) }));
  }
}

function progressOf(status: TaskStatus): number {
  return status.count("rounds") + status.count("bytes") + status.count("received") + status.count("sent");
}

/** Ends tasks and waits for their last words. */
async function end(place: LoadPlace, tasks: readonly string[]): Promise<TaskStatus[]> {
  for (const task of tasks) if (task !== "tcp-receive") await place.stop(task);
  return await finished(place, tasks);
}

/** What guest-load is told to do for a task. */
function words(task: string, devices: MigrationLabOptions, where: "guest" | "outside"): string[] {
  const peer = where === "guest" ? OUTSIDE_ADDRESS : GUEST_ADDRESS;
  const [own, other] = where === "guest" ? [PORTS.toGuest, PORTS.toOutside] : [PORTS.toOutside, PORTS.toGuest];
  const details: Readonly<Record<string, readonly string[]>> = {
    memory: [`${MEMORY}`],
    disk: ["/dev/vda", `${2 * (devices.blk ?? 1)}`],
    "udp-receive": [own],
    "tcp-receive": [own],
    "udp-send": [peer, other, `${PACE}`],
    "tcp-send": [peer, other, `${RATE}`],
    announcements: [BRIDGE],
  };
  return [task, ...(details[task] ?? [])];
}
