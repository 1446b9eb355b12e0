import { afterAll, afterEach, beforeAll, expect, test } from "bun:test";
import { mkdir, symlink, writeFile } from "node:fs/promises";
import { join } from "node:path";
import type { VhostUserFrontend } from "../kit/frontend/frontend.ts";
import type { Machine } from "../kit/machine/inside.ts";
import { MachineLab } from "../kit/machine/lab.ts";
import { PciAddress } from "../kit/machine/pci-function.ts";
import { rejection } from "../kit/rejection.ts";
import { VerifiedDisk } from "../kit/verified-disk.ts";

/** IOMMU groups: what the IOMMU cannot tell apart belongs to one VM, or to nobody. */

const TIMEOUT = 120_000;
const VM = "0b6a6e0e-6a55-4a8c-9a54-5b5a2f3d7c21";
const OTHER_VM = "0b6a6e0e-6a55-4a8c-9a54-5b5a2f3d7c22";
/** Of the bridge that both functions are behind: hot-plug, for which the kernel does not give the group away. */
const BRIDGE_DRIVER = "shpchp";
/** Nothing of this machine has it. */
const NO_GROUP = "0000:7e:00.0";

let lab: MachineLab;
let first: ReturnType<Machine["function"]>;
let second: ReturnType<Machine["function"]>;
/** Where the kernel has that driver. */
let bridge: PciAddress | undefined;

beforeAll(async () => {
  lab = await MachineLab.create();
  first = lab.machine.function("bridged0");
  second = lab.machine.function("bridged1");
  bridge = first.groupMembers.map((address) => new PciAddress(address)).find(({ driver }) => driver === BRIDGE_DRIVER);
  bridge?.release();
}, TIMEOUT);
afterEach(async () => {
  for (const { vf } of ((await lab.call("vf.list")) as { vfs: { vf: string }[] }).vfs) await lab.remove(vf);
}, TIMEOUT);
afterAll(async () => {
  bridge?.bind(BRIDGE_DRIVER);
  await lab?.[Symbol.asyncDispose]();
}, TIMEOUT);

test(
  "a function that is not bound to vfio-pci is refused with its driver and the command that binds it",
  async () => {
    const { message, fix } = await refusal(lab.add(first.address));
    expect(message).toContain(first.address);
    expect(message).toContain("virtio-pci");
    expect(fix).toContain(`vfe-vhost-cli bind ${first.address}`);
  },
  TIMEOUT,
);

test(
  "a function whose group another driver shares is refused, naming function and driver",
  async () => {
    expect(first.group).toBe(second.group);
    {
      using _bound = first.bind();
      const { message, fix } = await refusal(lab.add(first.address));
      expect(message).toContain(`${first.group}`);
      expect(message).toContain(second.address);
      expect(message).toContain("virtio-pci");
      expect(fix).toContain(second.address);
    }
    using _first = first.bind();
    using _second = second.bind();
    if (bridge !== undefined) {
      bridge.bind(BRIDGE_DRIVER);
      const { message } = await refusal(lab.add(first.address));
      expect(message).toContain(`${bridge.address} (driver ${BRIDGE_DRIVER})`);
      bridge.release();
    }
    // Nothing of the refusals is left: with all bound it works.
    await lab.add(first.address);
    using guest = await boot(first.address);
    await new VerifiedDisk().steps(guest.queues[0]!.driver, 5);
    guest[Symbol.dispose]();
    await lab.remove(first.address);
  },
  TIMEOUT,
);

test(
  "two functions of one group work side by side in one VM",
  async () => {
    using _first = first.bind();
    using _second = second.bind();
    await lab.add(first.address, { vm: VM });
    await lab.add(second.address, { vm: VM });
    const guests = [await boot(first.address), await boot(second.address, 2 ** 33)];
    const io = guests.map((guest) => new VerifiedDisk().runOn(guest.queues[0]!.driver, 2));
    await Promise.all(io.map((one) => one.progress(20)));
    // The group stays open for the one that goes on.
    await io[0]!.stop();
    guests[0]![Symbol.dispose]();
    await lab.remove(first.address);
    await io[1]!.progress(20);
    await lab.add(first.address, { vm: VM });
    await io[1]!.progress(20);
    await io[1]!.stop();
    guests[1]![Symbol.dispose]();
    await lab.remove(first.address);
    await lab.remove(second.address);
  },
  TIMEOUT,
);

test(
  "two VMs cannot share a group: the second is refused, naming who has it; the first goes on",
  async () => {
    using _first = first.bind();
    using _second = second.bind();
    await lab.add(first.address, { vm: VM });
    using guest = await boot(first.address);
    const io = new VerifiedDisk().runOn(guest.queues[0]!.driver, 2);
    const { message } = await refusal(lab.add(second.address, { vm: OTHER_VM }));
    expect(message).toContain(`${second.group}`);
    expect(message).toContain(`${lab.daemon.pid}`);
    await io.progress(20);
    await io.stop();
    guest[Symbol.dispose]();
    await lab.remove(first.address);
    // Free again.
    await lab.add(second.address, { vm: OTHER_VM });
    await lab.remove(second.address);
  },
  TIMEOUT,
);

test(
  "a function that no IOMMU keeps apart is refused, with what switches the IOMMU on",
  async () => {
    const bus = join(lab.directory, "bus");
    const directory = join(bus, NO_GROUP);
    await mkdir(directory, { recursive: true });
    const attributes = { vendor: "0x1af4\n", device: "0x1042\n", class: "0x010000\n" };
    for (const [name, value] of Object.entries(attributes)) await writeFile(join(directory, name), value);
    await symlink("/sys/bus/pci/drivers/vfio-pci", join(directory, "driver"));
    await lab.killDaemon();
    await lab.startDaemon("--bus", bus);
    const { message, fix } = await refusal(lab.add(NO_GROUP));
    expect(message).toContain(NO_GROUP);
    expect(message).toMatch(/IOMMU/);
    expect(fix).toContain("intel_iommu=on");
  },
  TIMEOUT,
);

/** @param high where the rings are; functions of one VM have theirs at different places */
async function boot(address: string, high = 2 ** 32): Promise<VhostUserFrontend> {
  const guest = lab.dial(address);
  await guest.negotiate();
  await guest.setupMemory([{ gpa: high, size: 4 << 20 }]);
  await guest.startQueues(1);
  return guest;
}

async function refusal(add: Promise<void>): Promise<{ readonly message: string; readonly fix: string }> {
  const error = (await rejection(add)) as Error & { readonly fix?: string };
  return { message: error.message, fix: error.fix ?? "" };
}
