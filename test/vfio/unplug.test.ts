import { afterAll, beforeAll, expect, test } from "bun:test";
import { existsSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { Deadline } from "../../src/base/deadline.ts";
import type { VhostUserFrontend } from "../kit/frontend/frontend.ts";
import { Child } from "../kit/guest/child.ts";
import { FRONTEND_MEMORY } from "../kit/machine/frontend-process.ts";
import { MachineLab } from "../kit/machine/lab.ts";
import { PciAddress } from "../kit/machine/pci-function.ts";
import { silenceBehind } from "../kit/machine/silent-bridge.ts";
import { type BackgroundIo, VerifiedDisk } from "../kit/verified-disk.ts";

/** Functions that go away, or say that they are broken, while guests use them. Another VF is busy all the time. */

const TIMEOUT = 180_000;
/** Milliseconds in which the kernel has taken a function away that it was told to. */
const REMOVAL_TIMEOUT = 30_000;
const HANG_UP_TIMEOUT = 30_000;
/** Requests that show that something works. */
const SOME = 30;

let lab: MachineLab;
let unharmed: VhostUserFrontend;
let io: BackgroundIo;

beforeAll(async () => {
  lab = await MachineLab.create();
  const [bystander] = lab.bind("blk0");
  lab.bind("blk1");
  await lab.add(bystander);
  unharmed = lab.dial(bystander);
  io = await busy(unharmed);
}, TIMEOUT);
afterAll(async () => {
  await io?.abandon();
  unharmed?.[Symbol.dispose]();
  await lab?.[Symbol.asyncDispose]();
}, TIMEOUT);

const victim = () => lab.machine.function("blk1");

/** Requests without an end, of which some are done. */
async function busy(frontend: VhostUserFrontend): Promise<BackgroundIo> {
  await frontend.negotiate();
  await frontend.setupMemory(FRONTEND_MEMORY);
  await frontend.startQueues(1);
  const running = new VerifiedDisk().runOn(frontend.queues[0]!.driver, 4);
  await running.progress(SOME);
  return running;
}

/**
 * The function is in use when `harm` comes to it: its VF fails and says why, its front-end is hung up on, the
 * VF can be removed.
 * @param inUse its guest makes requests meanwhile, or has none
 * @returns the reason
 */
async function failsWith(
  harm: (address: string) => Promise<unknown>,
  inUse: "busy" | "idle" = "busy",
  { address } = victim(),
): Promise<string> {
  await lab.add(address);
  using frontend = lab.dial(address);
  const running = await busy(frontend);
  if (inUse === "idle") await running.stop();
  await harm(address);
  const { reason } = await lab.reaches(address, "failed");
  await frontend.hungUp();
  const left = async () => !(await lab.info(address)).connected || undefined;
  await Deadline.after(HANG_UP_TIMEOUT, `end of the session of ${address}`).poll(left, 50);
  frontend[Symbol.dispose]();
  await running.abandon();
  await io.progress(SOME);
  // Whether the function is there or not.
  await lab.remove(address);
  return reason ?? "";
}

/** A function that is back is added again, and works. */
async function worksAgain(fn = victim()): Promise<void> {
  const { address } = fn;
  fn.bind();
  await lab.add(address);
  {
    using frontend = lab.dial(address);
    const running = await busy(frontend);
    await running.stop();
  }
  await lab.reaches(address, "idle");
  await lab.remove(address);
  await io.progress(SOME);
}

/** Takes what shares the group of `fn` from a driver with which the kernel does not give the group away. */
function withoutDriver(fn: PciAddress, driver: string): Disposable {
  const others = fn.groupMembers.map((address) => new PciAddress(address)).filter((other) => other.driver === driver);
  for (const other of others) other.release();
  return {
    [Symbol.dispose]() {
      for (const other of others) other.bind(driver);
    },
  };
}

test(
  "a function is unplugged by QEMU: the daemon lets go of it, and takes it when it is back",
  async () => {
    const before = victim();
    expect(await failsWith(() => lab.machine.unplug(before))).toContain("wanted back by the kernel");
    await lab.machine.plug(before);
    await worksAgain();
  },
  TIMEOUT,
);

test(
  "a function is removed in sysfs, and found again",
  async () => {
    const { port } = victim().description;
    const reason = await failsWith(async (address) => {
      // A process of its own: the kernel keeps it until nobody has the function open.
      const log = join(lab.directory, "remove.log");
      await using remover = new Child(["sh", "-c", `echo 1 > /sys/bus/pci/devices/${address}/remove`], {
        name: "sh",
        log,
      });
      await Deadline.after(REMOVAL_TIMEOUT, `removal of ${address}`).race(remover.exited);
      expect(await remover.exited).toBe(0);
      expect(existsSync(`/sys/bus/pci/devices/${address}`)).toBe(false);
    });
    expect(reason).toContain("wanted back by the kernel");
    writeFileSync(`/sys/bus/pci/devices/${port}/rescan`, "1");
    await worksAgain();
  },
  TIMEOUT,
);

test(
  "a function is taken from vfio-pci while it is in use",
  async () => {
    const reason = await failsWith(async (address) => {
      const log = join(lab.directory, "unbind.log");
      const command = `echo ${address} > /sys/bus/pci/drivers/vfio-pci/unbind`;
      await using unbinder = new Child(["sh", "-c", command], { name: "sh", log });
      await Deadline.after(REMOVAL_TIMEOUT, `unbinding of ${address}`).race(unbinder.exited);
      expect(await unbinder.exited).toBe(0);
    });
    expect(reason).toContain("wanted back by the kernel");
    await worksAgain();
  },
  TIMEOUT,
);

test(
  "a function reports an error that it cannot correct (AER)",
  async () => {
    expect(await failsWith(() => lab.machine.injectError(victim(), "COMP_ABORT"))).toContain("AER");
    await worksAgain();
  },
  TIMEOUT,
);

test(
  "a function stops answering: its VF fails and can be removed, and added once the function was found again",
  async () => {
    // One that the kernel knows no way to reset: it would try to for minutes, and keep us from its bridge meanwhile.
    const fn = lab.machine.function("bridged0");
    using _bridge = withoutDriver(fn, "shpchp");
    lab.bind("bridged0", "bridged1");
    let silence: Disposable | undefined;
    const silent = async () => {
      silence = silenceBehind(fn.description.port);
    };
    try {
      expect(await failsWith(silent, "idle", fn)).toContain("does not answer");
    } finally {
      silence?.[Symbol.dispose]();
    }
    // What the kernel wrote to both when the daemon closed one was lost: they are not as the kernel believes.
    for (const id of ["bridged0", "bridged1"]) lab.machine.function(id).writeAttribute("remove", "1");
    writeFileSync(`/sys/bus/pci/devices/${fn.description.port}/rescan`, "1");
    lab.machine.function("bridged1").bind();
    await worksAgain(lab.machine.function("bridged0"));
  },
  TIMEOUT,
);
