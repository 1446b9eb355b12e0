import { afterAll, afterEach, beforeAll, describe, expect, test } from "bun:test";
import { readdirSync, readlinkSync } from "node:fs";
import { Deadline } from "../../src/base/deadline.ts";
import { ERROR_NUMBERS, VhostdError } from "../../src/base/errors.ts";
import { atLength } from "../kit/at-length.ts";
import { Dice } from "../kit/dice.ts";
import { SEED } from "../kit/fuzz.ts";
import { lockedMemory } from "../kit/machine/bare-function.ts";
import { Machine } from "../kit/machine/inside.ts";
import { BusyDisk, type BusyGuest, BusyNetwork, sessionsGoOn } from "../kit/machine/kill-guests.ts";
import { MACHINE_TEST_TIMEOUT, MachineLab } from "../kit/machine/lab.ts";
import { PciAddress } from "../kit/machine/pci-function.ts";
import { VirtioWindow } from "../kit/machine/virtio-window.ts";

/**
 * The daemon is killed at any moment while it drives functions of the kernel's VFIO for guests that are busy, and another one
 * goes on: no guest notices, no front-end is hung up on, no function touches what it must not.
 */

const TIMEOUT = atLength(20 * 60_000, MACHINE_TEST_TIMEOUT);
const KILLS = atLength(170, 6);
/** Kills in each of six operations. */
const ROUNDS = atLength(5, 1);
/** Milliseconds from the start of a daemon in which it may be killed: it takes about two to start and to take all up. */
const LIFE = 3_000;
/** Milliseconds. */
const UNBIND_TIMEOUT = 20_000;
const SOME = 5;
const VM = "11111111-1111-1111-1111-111111111111";
/** Each front-end of the VM tells of memory of its own. */
const memoryOf = (place: number) => [{ gpa: 2 ** 32 + place * 2 ** 30, size: 16 << 20 }];
const PLUGGED = { gpa: 2 ** 36, size: 16 << 20 };
const { sriov } = Machine.here().description;

const dice = new Dice(SEED);
let lab: MachineLab;
/** Disks: kicks come by eventfds, doorbells are mapped, and one that comes and goes. */
let kicked: string;
let rung: string;
let other: string;
/** Network functions that reach each other. The first is a VF where there are any. */
let nets: readonly [string, string];

beforeAll(async () => {
  lab = await MachineLab.create({ keeper: true });
  [kicked, rung, other] = lab.bind("blk1", "blk2", "blk0");
  const [first, second] = lab.bind("net0", "net1");
  nets = [sriov ? (await lab.makeVfs("pf0", 1))[0]! : first, second];
}, MACHINE_TEST_TIMEOUT);
afterAll(async () => {
  await lab?.[Symbol.asyncDispose]();
}, MACHINE_TEST_TIMEOUT);
afterEach(async () => {
  await lab.takenUp();
  await lab.removeAll();
}, MACHINE_TEST_TIMEOUT);

async function startDisk(place: number): Promise<BusyDisk> {
  const address = [kicked, rung, other][place]!;
  await lab.add(address, { vm: VM });
  return await BusyDisk.start(lab, address, {
    queues: [2, 2, 1][place]!,
    memory: memoryOf(place),
    doorbells: address === rung,
  });
}

async function startNetwork(): Promise<BusyNetwork> {
  for (const address of nets) await lab.add(address, { ofPf: sriov && address === nets[0] });
  return await BusyNetwork.start(lab, nets);
}

/** After a kill: all goes on as if nothing had been. */
async function unnoticed(guests: readonly BusyGuest[]): Promise<void> {
  await lab.takenUp();
  await sessionsGoOn(guests);
  await Promise.all(guests.map((guest) => guest.progress(SOME)));
  const sessions = guests.reduce((sum, { frontends }) => sum + frontends.length, 0);
  expect(await lab.call("stats")).toMatchObject({ sessions, protected: true });
  expect(lab.takeFaults()).toEqual([]);
}

/** How long operations take that nobody disturbs, milliseconds. */
const durations = new Map<string, number>();

/** The daemon is killed in the operation, and another one started; not in the first of its name, which says how long it takes. */
async function killIn<T>(name: string, operation: () => Promise<T>): Promise<T> {
  const usual = durations.get(name);
  const began = performance.now();
  const result = operation();
  if (usual === undefined) {
    await result;
    durations.set(name, performance.now() - began);
    return result;
  }
  // Looked at below.
  result.catch(() => {});
  await Bun.sleep(dice.roll(Math.ceil(usual)));
  await lab.replaceDaemon();
  return await result;
}

/** An operator's, whose daemon may go away before it answers. */
async function attempt(operation: Promise<void>, ...passes: readonly number[]): Promise<void> {
  try {
    await operation;
  } catch (error) {
    if (!(error instanceof VhostdError && passes.includes(error.number))) throw error;
  }
}

/** All stop, and what the back-end says of each queue is what the guest has had back. */
async function stopAll(guests: readonly BusyGuest[]): Promise<void> {
  await Promise.all(guests.map((guest) => guest.finish()));
  for (const guest of guests) {
    const bases = [];
    for (const frontend of guest.frontends) bases.push(await frontend.stop({ order: "new" }));
    expect(bases).toEqual(guest.returned as number[][]);
  }
}

/** Nobody has the function any more: the kernel takes it from its driver at once. */
async function unbinds(address: string): Promise<void> {
  // Where somebody has it open, the kernel waits for that, and so would this process.
  const unbind = Bun.spawn(["sh", "-c", `echo ${address} > /sys/bus/pci/drivers/vfio-pci/unbind`]);
  expect(await Deadline.after(UNBIND_TIMEOUT, `unbinding of ${address}`).race(unbind.exited)).toBe(0);
  new PciAddress(address).bind();
}

/** What the keeper has of the kernel's VFIO. */
function keptFiles(): string[] {
  const directory = `/proc/${lab.keeper.pid}/fd`;
  return readdirSync(directory)
    .map((fd) => linkOf(`${directory}/${fd}`))
    .filter((link) => /vfio|iommu/.test(link));
}

function linkOf(path: string): string {
  try {
    return readlinkSync(path);
  } catch {
    return "";
  }
}

test(
  `killed ${KILLS} times at any moment: two disks, one with its doorbells mapped, and a network go on (seed ${SEED})`,
  async () => {
    const pf = sriov ? lab.machine.function("pf0").address : undefined;
    if (pf !== undefined) await lab.call("pf.add", { device: pf });
    using undo = new DisposableStack();
    const guests: BusyGuest[] = [];
    for (const place of [0, 1]) guests.push(undo.use(await startDisk(place)));
    guests.push(undo.use(await startNetwork()));
    for (let kill = 0; kill < KILLS; kill++) {
      await lab.replaceDaemon();
      // Some live on, some die while they start or take up what there is.
      await Bun.sleep(dice.roll(LIFE));
      if (dice.roll(2) === 0 && kill < KILLS - 1) continue;
      await unnoticed(guests);
    }
    await stopAll(guests);
    undo.dispose();
    await lab.removeAll();
    if (pf !== undefined) await lab.call("pf.remove", { device: pf });
    expect(keptFiles()).toEqual([]);
    for (const address of [kicked, rung, ...nets]) await unbinds(address);
    await Deadline.after(10_000, "unlocking of memory").poll(() => lockedMemory(lab.daemon.pid) === 0 || undefined, 20);
  },
  TIMEOUT,
);

test(
  "nobody is needed while a guest rings doorbells; and a keeper that is killed alone is missed by nobody",
  async () => {
    using guest = await startDisk(1);
    await lab.killDaemon();
    await guest.progress(SOME);
    await lab.startDaemon();
    await unnoticed([guest]);

    await lab.keeper.kill();
    await guest.progress(SOME);
    await sessionsGoOn([guest]);
    await lab.startKeeper();
    const isProtected = async () =>
      ((await lab.call("stats")) as { readonly protected: boolean }).protected || undefined;
    await Deadline.after(30_000, "the keeper to have all again").poll(isProtected, 50);
    await lab.replaceDaemon();
    await unnoticed([guest]);
    await stopAll([guest]);
  },
  TIMEOUT,
);

describe("killed in an operation, while a neighbour of the same VM is busy:", () => {
  test(
    "stop and start",
    async () => {
      using neighbour = await startDisk(1);
      using guest = await startDisk(0);
      for (let round = 0; round <= ROUNDS; round++) {
        guest.pause();
        const bases = await killIn("stop", () => guest.frontend.stop({ order: dice.pick(["old", "new"]) }));
        for (const { driver } of guest.frontend.queues) driver.collect();
        expect(bases).toEqual(guest.returned[0] as number[]);
        await lab.takenUp();
        await killIn("start", () => guest.frontend.resumeQueues(bases));
        guest.resume();
        await unnoticed([guest, neighbour]);
      }
      await stopAll([guest, neighbour]);
    },
    TIMEOUT,
  );

  test(
    "memory is plugged and unplugged",
    async () => {
      using neighbour = await startDisk(1);
      using guest = await startDisk(0);
      const { frontend } = guest;
      for (let round = 0; round <= ROUNDS; round++) {
        const region = frontend.memory.add(PLUGGED.gpa, PLUGGED.size);
        expect(await killIn("plug", () => frontend.addRegion(region))).toBe(0n);
        await unnoticed([guest, neighbour]);
        expect(await killIn("unplug", () => frontend.removeRegion(region))).toBe(0n);
        frontend.memory.drop(region);
        await unnoticed([guest, neighbour]);
      }
      await stopAll([guest, neighbour]);
    },
    TIMEOUT,
  );

  test(
    "another function is added and removed",
    async () => {
      using neighbour = await startDisk(1);
      const { connectionLost, vfExists, vfNotFound } = ERROR_NUMBERS;
      for (let round = 0; round <= ROUNDS; round++) {
        await killIn("add", () => attempt(lab.add(other, { vm: VM }), connectionLost));
        await unnoticed([neighbour]);
        await attempt(lab.add(other, { vm: VM }), vfExists);
        using guest = await BusyDisk.start(lab, other, { queues: 1, memory: memoryOf(2) });
        await unnoticed([neighbour, guest]);
        await killIn("remove", () => attempt(lab.remove(other), connectionLost));
        await lab.takenUp();
        await attempt(lab.remove(other), vfNotFound);
        await guest.frontend.hungUp();
        await guest.abandon();
        expect(new VirtioWindow(other)).toMatchObject({ status: 0, busMaster: false });
        await unnoticed([neighbour]);
        await unbinds(other);
      }
      await stopAll([neighbour]);
    },
    TIMEOUT,
  );
});
