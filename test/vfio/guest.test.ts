import { afterAll, beforeAll, expect, test } from "bun:test";
import { readFile } from "node:fs/promises";
import { Deadline } from "../../src/base/deadline.ts";
import { Guest } from "../kit/guest/guest.ts";
import { buildGuestImage, quickestGuestKernel } from "../kit/guest/image.ts";
import { Load } from "../kit/guest/load.ts";
import { MachineLab } from "../kit/machine/lab.ts";

/**
 * A Linux guest inside the machine. Its first disk is a function that has a doorbell page for each queue, and its QEMU lets
 * such a page into the guest; its second disk's QEMU does not, so that the daemon relays each kick.
 */

/** The guest has one processor, and uses no more. */
const QUEUES = 1;
/** Milliseconds, for a guest that is emulated by a machine that is emulated. */
const BOOT_TIMEOUT = 280_000;
const STEP_TIMEOUT = 120_000;

let lab: MachineLab;
let guest: Guest;
let functions: readonly [string, string];

beforeAll(async () => {
  lab = await MachineLab.create();
  functions = lab.bind("blk2", "blk1");
  for (const address of functions) await lab.add(address, { vm: "33333333-3333-3333-3333-333333333333" });
  const [first, second] = functions.map(
    (address) => ({ socket: lab.socket(address), queues: QUEUES, role: "connect" }) as const,
  );
  guest = await Guest.boot({
    directory: lab.directory,
    name: "guest",
    accelerator: "tcg",
    memory: 128,
    image: await buildGuestImage(await quickestGuestKernel()),
    disks: [first!, { ...second!, pagePerVq: false }],
  });
}, BOOT_TIMEOUT);
afterAll(async () => {
  await guest?.[Symbol.asyncDispose]();
  await lab?.[Symbol.asyncDispose]();
}, STEP_TIMEOUT);

/** Waits until QEMU has so many pages of VFIO devices mapped: those of doorbells. */
async function doorbellPages(expected: number): Promise<void> {
  await Deadline.after(STEP_TIMEOUT, `${expected} doorbells in QEMU`).poll(async () => {
    const maps = (await readFile(`/proc/${guest.vm.qemu.pid}/maps`, "utf8")).split("\n");
    const ranges = maps.filter((line) => line.includes("vfio")).map((line) => line.split(/[- ]/));
    const sizes = ranges.map(([start, end]) => Number.parseInt(end!, 16) - Number.parseInt(start!, 16));
    return sizes.reduce((sum, size) => sum + size, 0) === expected * 4096 || undefined;
  }, 50);
}

test("both disks run, and QEMU has the doorbells of the first", async () => {
  for (const address of functions) expect((await lab.info(address)).state).toBe("running");
  await doorbellPages(QUEUES);
});

test(
  "what the guest writes it reads again, on both disks, before and after stop and cont",
  async () => {
    const load = await Load.start(guest, ["vda", "vdb"], 8, 1, STEP_TIMEOUT, 1);
    await guest.vm.qmp.execute("stop");
    await doorbellPages(0);
    await guest.vm.qmp.execute("cont");
    await load.progress(STEP_TIMEOUT);
    await doorbellPages(QUEUES);
    expect(await load.stop()).toBeGreaterThan(0);
    expect(lab.takeFaults()).toEqual([]);
  },
  3 * STEP_TIMEOUT,
);

test(
  "the guest goes, and the functions are free for the next one",
  async () => {
    await guest[Symbol.asyncDispose]();
    for (const address of functions) {
      await lab.reaches(address, "idle");
      await lab.remove(address);
    }
    expect(lab.takeFaults()).toEqual([]);
  },
  STEP_TIMEOUT,
);
