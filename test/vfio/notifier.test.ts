import { afterAll, beforeAll, beforeEach, expect, test } from "bun:test";
import { join } from "node:path";
import { Deadline } from "../../src/base/deadline.ts";
import { drainEventfd } from "../../src/native/sys.ts";
import { ProtocolFeature } from "../../src/vhost-user/messages.ts";
import { Status } from "../../src/virtio/features.ts";
import { exchange, run } from "../kit/machine/disk-guest.ts";
import { FrontendProcess } from "../kit/machine/frontend-process.ts";
import { givenDoorbells, HostNotifiers } from "../kit/machine/host-notifier.ts";
import { MACHINE_TEST_TIMEOUT, MachineLab } from "../kit/machine/lab.ts";
import { VirtioWindow } from "../kit/machine/virtio-window.ts";
import { rejection } from "../kit/rejection.ts";

/**
 * Doorbells that a front-end maps itself, and what becomes of the function when it does not let go of them: the kernel
 * keeps a function open, and does not reset it, as long as anybody has its doorbell mapped.
 */

const QUEUES = 2;
/** Requests in each queue where a test wants to see that it works. */
const SOME = 50;
/** Milliseconds in which a device that works would have taken a request a hundred times. */
const LONG_ENOUGH = 300;

let lab: MachineLab;
/** A function whose queues have a doorbell page each, and one where all share one. */
let own: string;
let shared: string;
let window: VirtioWindow;
let logs = 0;

beforeAll(async () => {
  lab = await MachineLab.create();
  [own, shared] = lab.bind("blk2", "blk1");
  window = new VirtioWindow(own);
}, MACHINE_TEST_TIMEOUT);
afterAll(async () => {
  await lab?.[Symbol.asyncDispose]();
}, MACHINE_TEST_TIMEOUT);
beforeEach(async () => {
  await lab.removeAll();
}, MACHINE_TEST_TIMEOUT);

function startProcess(): Promise<FrontendProcess> {
  const log = join(lab.directory, `front-end${logs++}.log`);
  return FrontendProcess.start(lab.socket(own), log, { queues: QUEUES, doorbells: true });
}

/** The function is added, and a front-end reads and writes. */
async function worksAgain(): Promise<void> {
  await lab.add(own);
  using frontend = lab.dial(own);
  await run(frontend, QUEUES);
  await exchange(frontend, SOME);
}

test(
  "a front-end rings the doorbells that it was given, and no kick eventfd is used",
  async () => {
    await lab.add(own);
    using frontend = lab.dial(own);
    await run(frontend, QUEUES);
    using _doorbells = await HostNotifiers.use(frontend);
    await exchange(frontend, SOME);
    expect(frontend.queues.map(({ kick }) => drainEventfd(kick.number))).toEqual([0, 0]);
  },
  MACHINE_TEST_TIMEOUT,
);

test(
  "doorbells are given again after each start, because a front-end drops them when it stops",
  async () => {
    await lab.add(own);
    using frontend = lab.dial(own);
    await run(frontend, QUEUES);
    {
      using _doorbells = await HostNotifiers.use(frontend);
      await exchange(frontend, SOME);
    }
    expect(givenDoorbells(frontend)).toHaveLength(QUEUES);
    const bases = await frontend.stop({ order: "new" });
    await frontend.resumeQueues(bases);
    const again = () => givenDoorbells(frontend).length === 2 * QUEUES || undefined;
    await Deadline.after(10_000, "the doorbells after a second start").poll(again, 10);
    using _doorbells = await HostNotifiers.use(frontend);
    await exchange(frontend, SOME);
  },
  MACHINE_TEST_TIMEOUT,
);

test.each([
  ["the operator wants that, and it works by kicks", () => own, { hostNotifier: false }],
  ["queues share a doorbell page", () => shared, {}],
] as const)(
  "nothing is given where %s",
  async (_name, address, options) => {
    await lab.add(address(), options);
    using frontend = lab.dial(address());
    await run(frontend, QUEUES);
    expect(frontend.has(ProtocolFeature.HOST_NOTIFIER)).toBe(false);
    await exchange(frontend, SOME);
    expect(givenDoorbells(frontend)).toEqual([]);
  },
  MACHINE_TEST_TIMEOUT,
);

test(
  "a VF is removed while a front-end that stands still has its doorbells: reset all the same",
  async () => {
    await lab.add(own);
    await using frontend = await startProcess();
    await frontend.freeze();
    using guest = frontend.openMemory();
    // What the guest offers is taken, as long as the VF is there.
    expect(window.status & Status.driverOk).toBe(Status.driverOk);
    guest.offerAgain(0);
    window.ring(0);
    const answered = () => guest.used(0) === guest.available(0) || undefined;
    await Deadline.after(10_000, "the function's answer to what was offered").poll(answered, 5);

    await lab.remove(own);
    expect(window.status).toBe(0);
    expect(window.busMaster).toBe(false);
    const used = guest.used(0);
    guest.offerAgain(0);
    window.ring(0);
    await Bun.sleep(LONG_ENOUGH);
    expect(guest.used(0)).toBe(used);

    // The kernel still has the function open: it says so, and who it is.
    const refusal = await rejection(lab.add(own));
    expect(refusal.message).toContain(`${frontend.pid}`);
    await frontend.thaw();
    await worksAgain();
  },
  MACHINE_TEST_TIMEOUT,
);

test(
  "the daemon is killed and started again while a front-end stands still: it answers, and names who holds the function",
  async () => {
    await lab.add(own);
    await using frontend = await startProcess();
    await frontend.freeze();
    await lab.killDaemon();
    await lab.startDaemon();
    const refusal = await rejection(lab.add(own));
    expect(refusal.message).toContain(own);
    expect(refusal.message).toContain(`${frontend.pid}`);
    expect((await rejection(lab.remove(own))).message).toContain(own);
    // Others are served meanwhile.
    await lab.add(shared);
    using other = lab.dial(shared);
    await run(other, QUEUES);
    await exchange(other, SOME);

    await frontend.kill();
    await worksAgain();
  },
  MACHINE_TEST_TIMEOUT,
);

test(
  "a front-end that has its doorbells is killed: the function is reset, and is ready for the next",
  async () => {
    await lab.add(own);
    {
      await using frontend = await startProcess();
      await frontend.kill();
    }
    await lab.reaches(own, "idle");
    expect(window.status).toBe(0);
    using frontend = lab.dial(own);
    await run(frontend, QUEUES);
    await exchange(frontend, SOME);
  },
  MACHINE_TEST_TIMEOUT,
);
