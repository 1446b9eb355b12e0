import { afterAll, beforeAll, beforeEach, expect, test } from "bun:test";
import { join } from "node:path";
import { Deadline } from "../../src/base/deadline.ts";
import { atLength } from "../kit/at-length.ts";
import type { VhostUserFrontend } from "../kit/frontend/frontend.ts";
import { lockedMemory } from "../kit/machine/bare-function.ts";
import { run } from "../kit/machine/disk-guest.ts";
import { FRONTEND_MEMORY, FrontendProcess } from "../kit/machine/frontend-process.ts";
import { MACHINE_TEST_TIMEOUT, MachineLab } from "../kit/machine/lab.ts";
import { VirtioWindow } from "../kit/machine/virtio-window.ts";
import { type BackgroundIo, VerifiedDisk } from "../kit/verified-disk.ts";

/** Processes that end in the middle of I/O. The lab looks into the kernel's log afterwards: there was no DMA fault. */

/** Bytes that a front-end's guest has. */
const GUEST = FRONTEND_MEMORY.reduce((sum, { size }) => sum + size, 0);
/** Milliseconds in which the kernel has reset what a dead process had open. */
const RESET_TIMEOUT = 20_000;
const SESSIONS = atLength(20, 4);
const SOME = 50;

let lab: MachineLab;
let one: string;
let two: string;

beforeAll(async () => {
  lab = await MachineLab.create();
  [one, two] = lab.bind("blk0", "blk1");
}, MACHINE_TEST_TIMEOUT);
afterAll(async () => {
  await lab?.[Symbol.asyncDispose]();
}, MACHINE_TEST_TIMEOUT);
beforeEach(async () => {
  await lab.removeAll();
}, MACHINE_TEST_TIMEOUT);

/** Requests without an end, of which some are done. */
async function busy(frontend: VhostUserFrontend): Promise<BackgroundIo> {
  await run(frontend, 1);
  const io = new VerifiedDisk().runOn(frontend.queues[0]!.driver, 8);
  await io.progress(SOME);
  return io;
}

/** A session from connect to hang-up, with some verified requests. */
async function session(address: string): Promise<void> {
  {
    using frontend = lab.dial(address);
    await run(frontend, 1);
    await new VerifiedDisk().steps(frontend.queues[0]!.driver, 3);
  }
  await lab.reaches(address, "idle");
}

/** The function does nothing, and cannot. */
async function isAtRest(address: string): Promise<void> {
  const window = new VirtioWindow(address);
  const deadline = Deadline.after(RESET_TIMEOUT, `reset of ${address}`);
  await deadline.poll(() => (window.status === 0 && !window.busMaster) || undefined, 10);
}

test(
  "a front-end is killed in mid-I/O: the function is reset and ready again, others go on",
  async () => {
    await lab.add(one);
    await lab.add(two);
    using other = lab.dial(one);
    const io = await busy(other);
    // It would keep the processors from the one that starts.
    io.pause();
    {
      const log = join(lab.directory, "front-end.log");
      await using frontend = await FrontendProcess.start(lab.socket(two), log, { queues: 2, depth: 16 });
      io.resume();
      await frontend.kill();
    }
    await lab.reaches(two, "idle");
    expect(new VirtioWindow(two).status).toBe(0);
    expect(lab.takeFaults()).toEqual([]);
    await session(two);
    await io.progress(SOME);
    await io.stop();
  },
  MACHINE_TEST_TIMEOUT,
);

test(
  "the daemon is killed in mid-I/O: the kernel resets the functions, and the next daemon takes them",
  async () => {
    // A front-end that maps a doorbell would keep the function open.
    for (const address of [one, two]) await lab.add(address, { hostNotifier: false });
    using first = lab.dial(one);
    using second = lab.dial(two);
    const running = [await busy(first), await busy(second)];
    await lab.killDaemon();
    await Promise.all([first.hungUp(), second.hungUp()]);
    for (const address of [one, two]) await isAtRest(address);
    for (const frontend of [first, second]) frontend[Symbol.dispose]();
    for (const io of running) await io.abandon();
    await lab.startDaemon();
    for (const address of [one, two]) {
      await lab.add(address);
      await session(address);
    }
    expect(lab.takeFaults()).toEqual([]);
  },
  MACHINE_TEST_TIMEOUT,
);

test(
  "the daemon is asked to end in mid-I/O: it does, and the functions are at rest",
  async () => {
    await lab.add(one);
    using frontend = lab.dial(one);
    const io = await busy(frontend);
    const { daemon } = lab;
    await lab.stopDaemon();
    expect(await daemon.exited).toBe(0);
    await frontend.hungUp();
    await isAtRest(one);
    frontend[Symbol.dispose]();
    await io.abandon();
    await lab.startDaemon();
    await lab.add(one);
    await session(one);
  },
  MACHINE_TEST_TIMEOUT,
);

test(
  "sessions leave nothing: file descriptors and locked memory are what they were",
  async () => {
    const { pid } = lab.daemon;
    const fds = async () => ((await lab.call("stats")) as { fds: number }).fds;
    const bare = { fds: await fds(), locked: lockedMemory(pid) };
    await lab.add(one);
    await session(one);
    const before = { fds: await fds(), locked: lockedMemory(pid) };
    expect(before.locked).toBe(bare.locked);
    for (let i = 0; i < SESSIONS; i++) await session(one);
    {
      using frontend = lab.dial(one);
      await run(frontend, 1);
      expect(lockedMemory(pid)).toBe(bare.locked + GUEST);
    }
    await lab.reaches(one, "idle");
    expect({ fds: await fds(), locked: lockedMemory(pid) }).toEqual(before);
    await lab.remove(one);
    expect({ fds: await fds(), locked: lockedMemory(pid) }).toEqual(bare);
  },
  MACHINE_TEST_TIMEOUT,
);
