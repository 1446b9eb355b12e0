import { afterAll, afterEach, beforeAll, expect, test } from "bun:test";
import { Deadline } from "../../src/base/deadline.ts";
import { RpcClient } from "../../src/rpc/client.ts";
import { Request } from "../../src/vhost-user/messages.ts";
import { Status } from "../../src/virtio/features.ts";
import type { VhostUserFrontend } from "../kit/frontend/frontend.ts";
import { run } from "../kit/machine/disk-guest.ts";
import { MACHINE_TEST_TIMEOUT, MachineLab } from "../kit/machine/lab.ts";
import { StolenSpace } from "../kit/machine/stolen-space.ts";
import { VerifiedDisk } from "../kit/verified-disk.ts";

/** Memory that is taken from a running queue behind everybody's back: what a bug of the daemon or of the kernel would do. */

const RINGS = { gpa: 2 ** 32, size: 4 << 20 };
const OTHER = { gpa: 0, size: 1 << 20 };

let lab: MachineLab;
let a = "";
let b = "";

beforeAll(async () => {
  lab = await MachineLab.create();
  [a, b] = lab.bind("blk0", "blk1");
}, MACHINE_TEST_TIMEOUT);
afterEach(async () => {
  await lab.removeAll();
}, MACHINE_TEST_TIMEOUT);
afterAll(async () => {
  await lab?.[Symbol.asyncDispose]();
}, MACHINE_TEST_TIMEOUT);

test(
  "memory that vanishes under a running queue: a reset is asked for, the other VF does not notice",
  async () => {
    await lab.add(a);
    using space = onlyOne(StolenSpace.of(lab.daemon.pid));
    await lab.add(b);
    using other = await boot(b);
    const otherIo = new VerifiedDisk().runOn(other.queues[0]!.driver, 2);
    using guest = await boot(a);
    const disk = new VerifiedDisk();
    await disk.steps(guest.queues[0]!.driver, 10);
    using events = await Events.of(lab);

    const range = { iova: RINGS.gpa, size: RINGS.size };
    await space.unmap(range);
    disk.step(guest.queues[0]!.driver).catch(() => {});

    const reason = await until(`the reason of ${a}`, async () => (await lab.info(a)).reason ?? undefined);
    expect(reason).toContain("asks for a reset");
    const { stdout } = await lab.cli("vf", "-i", a);
    expect(stdout).toContain("asks for a reset");
    expect(events.reasons(a).some((text) => text.includes("asks for a reset"))).toBe(true);
    const status = await guest.askU64(Request.GET_STATUS);
    expect(Number(status) & Status.needsReset).toBe(Status.needsReset);
    const faults = lab.takeFaults();
    expect(faults.length).toBeGreaterThan(0);
    for (const { address, iova } of faults) {
      expect(address).toBe(a);
      expect(Number(iova)).toBeGreaterThanOrEqual(range.iova);
      expect(Number(iova)).toBeLessThan(range.iova + range.size);
    }

    await otherIo.progress(20);
    expect((await lab.info(b)).reason).toBeNull();

    // The memory is back; the front-end connects anew, for which the device is reset.
    await space.map(range, guest.memory.regions.at(-1)!.file.file.number);
    guest[Symbol.dispose]();
    await lab.reaches(a, "idle");
    using again = await boot(a);
    await new VerifiedDisk().steps(again.queues[0]!.driver, 20);
    expect((await lab.info(a)).reason).toBeNull();

    await otherIo.progress(20);
    await otherIo.stop();
    await lab.remove(a);
    await lab.remove(b);
  },
  MACHINE_TEST_TIMEOUT,
);

test(
  "memory that stays away: the VF says so and works again once it was removed and added, the other one all the time",
  async () => {
    await lab.add(a);
    using space = onlyOne(StolenSpace.of(lab.daemon.pid));
    await lab.add(b);
    using other = await boot(b);
    const otherIo = new VerifiedDisk().runOn(other.queues[0]!.driver, 2);
    {
      using guest = await boot(a);
      await new VerifiedDisk().steps(guest.queues[0]!.driver, 10);
      await space.unmap({ iova: RINGS.gpa, size: RINGS.size });
      new VerifiedDisk().step(guest.queues[0]!.driver).catch(() => {});
      await until(`the reason of ${a}`, async () => (await lab.info(a)).reason ?? undefined);
    }
    await until(`end of the session of ${a}`, async () => !(await lab.info(a)).connected || undefined);
    expect(lab.takeFaults().every(({ address }) => address === a)).toBe(true);
    await lab.remove(a);
    await lab.add(a);
    {
      using guest = await boot(a);
      await new VerifiedDisk().steps(guest.queues[0]!.driver, 20);
      expect((await lab.info(a)).reason).toBeNull();
    }
    await otherIo.progress(20);
    await otherIo.stop();
    await lab.remove(a);
    await lab.remove(b);
  },
  MACHINE_TEST_TIMEOUT,
);

/** What the daemon tells of its VFs. */
class Events implements Disposable {
  private readonly seen: { readonly vf?: string; readonly reason?: string | null }[] = [];

  private constructor(private readonly client: RpcClient) {
    client.onNotification((_, event) => void this.seen.push(event as (typeof this.seen)[number]));
  }

  static async of({ rpcSocket }: MachineLab): Promise<Events> {
    const deadline = Deadline.after(MACHINE_TEST_TIMEOUT, "the daemon's events");
    const client = await RpcClient.connect(rpcSocket, deadline);
    const events = new Events(client);
    await client.call("events.subscribe", {}, deadline);
    return events;
  }

  reasons(vf: string): string[] {
    return this.seen.flatMap((event) => (event.vf === vf && event.reason ? [event.reason] : []));
  }

  [Symbol.dispose](): void {
    this.client[Symbol.dispose]();
  }
}

async function boot(address: string): Promise<VhostUserFrontend> {
  const guest = lab.dial(address);
  await run(guest, 1, [OTHER, RINGS]);
  return guest;
}

function until<T>(what: string, done: () => Promise<T | undefined>): Promise<T> {
  return Deadline.after(30_000, what).poll(done, 100);
}

function onlyOne(spaces: readonly StolenSpace[]): StolenSpace {
  const [space, ...others] = spaces;
  if (space === undefined || others.length > 0) throw new Error(`the daemon has ${spaces.length} IOMMU address spaces`);
  return space;
}
