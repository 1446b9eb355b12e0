import { afterAll, beforeAll, beforeEach, expect, test } from "bun:test";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { Deadline } from "../../src/base/deadline.ts";
import { SystemError } from "../../src/base/errors.ts";
import { slowIoctl } from "../../src/native/slow.ts";
import { eventfd, signalEventfd } from "../../src/native/sys.ts";
import { DeviceRequest } from "../../src/pci/vfio/device-uapi.ts";
import { exchange, run } from "../kit/machine/disk-guest.ts";
import { FrontendProcess } from "../kit/machine/frontend-process.ts";
import { FunctionDriver } from "../kit/machine/function-driver.ts";
import { givenDoorbells } from "../kit/machine/host-notifier.ts";
import { MACHINE_TEST_TIMEOUT, MachineLab } from "../kit/machine/lab.ts";
import { rejection } from "../kit/rejection.ts";
import { VerifiedDisk } from "../kit/verified-disk.ts";

/** A function whose doorbells were given away, and a front-end that resets it without an end: nobody else is kept waiting. */

const QUEUES = 2;
const SOME = 50;
/** In one of so many something else was served, also where the machine is busy. */
const RESETS = 50;
/** So much else, while something waited for a reset. */
const served = (counts: readonly number[]) => counts.some((count) => count > 3);

let lab: MachineLab;
/** A function whose doorbells are given away, and one whose kicks are relayed. */
let lent: string;
let other: string;

beforeAll(async () => {
  lab = await MachineLab.create();
  [lent, other] = lab.bind("blk2", "blk1");
}, MACHINE_TEST_TIMEOUT);
afterAll(async () => {
  await lab?.[Symbol.asyncDispose]();
}, MACHINE_TEST_TIMEOUT);
beforeEach(async () => {
  await lab.removeAll();
}, MACHINE_TEST_TIMEOUT);

/** The counter of an eventfd, which stays. */
function unread(fd: number): number {
  return Number.parseInt(
    /^eventfd-count:\s*(\w+)/m.exec(readFileSync(`/proc/self/fdinfo/${fd}`, "utf8"))?.[1] ?? "",
    16,
  );
}

/** Resets a function again and again until it is disposed of. @param between called after each that was carried out */
function resetting(fd: number, between: () => void = () => {}) {
  let done = false;
  const loop = (async () => {
    while (!done) {
      try {
        await slowIoctl(fd, DeviceRequest.reset, 0);
        between();
      } catch (error) {
        // EAGAIN: somebody else has it locked.
        if (!(error instanceof SystemError)) throw error;
      }
    }
  })();
  return {
    async [Symbol.asyncDispose]() {
      done = true;
      await loop;
    },
  };
}

test(
  "registers that are read while somebody resets the function keep nobody waiting",
  async () => {
    await using driver = await FunctionDriver.open(lent);
    await driver.start(1);
    const page = driver.doorbell(0).share()!;
    let resets = 0;
    let turns = 0;
    const counting = setInterval(() => turns++, 1);
    const during = async (access: Promise<number>) => {
      const before = turns;
      await access;
      return turns - before;
    };
    const [status, config]: [number[], number[]] = [[], []];
    {
      await using _loop = resetting(page.fd, () => resets++);
      while (resets < RESETS && !(served(status) && served(config))) {
        status.push(await during(driver.device.status()));
        await Bun.sleep(5);
        config.push(await during(driver.fn.config.read(0, 2)));
        await Bun.sleep(5);
      }
    }
    clearInterval(counting);
    // Inside the kernel this thread would have let none pass.
    expect({ status: served(status), config: served(config) }).toEqual({ status: true, config: true });
  },
  MACHINE_TEST_TIMEOUT,
);

test(
  "kicks to a function that somebody resets hold up no kicks to others",
  async () => {
    await using driver = await FunctionDriver.open(lent);
    await using neighbour = await FunctionDriver.open(other);
    using kick = eventfd();
    using own = eventfd();
    await neighbour.start(1, () => signalEventfd(own.number));
    using _relayed = neighbour.doorbell(0).connect(own.number, 0);
    await driver.start(1);
    using _watched = driver.doorbell(0).connect(kick.number, 0);
    const page = driver.doorbell(0).share()!;
    const disk = new VerifiedDisk(0);
    let resets = 0;
    const during: number[] = [];
    let verified = 0;
    {
      await using _loop = resetting(page.fd, () => {
        resets++;
        during.push(verified);
        verified = 0;
      });
      while (resets < RESETS && !served(during)) {
        signalEventfd(kick.number);
        await disk.step(neighbour.queues[0]!);
        verified++;
      }
    }
    // The relay, if it waited for the function, would wait until the reset has ended.
    expect(served(during)).toBe(true);
  },
  MACHINE_TEST_TIMEOUT,
);

test(
  "kicks by eventfd reach a function that was lent, after a stop too",
  async () => {
    await lab.add(lent);
    using frontend = lab.dial(lent);
    await run(frontend, QUEUES);
    const given = (count: number) => () => givenDoorbells(frontend).length >= count || undefined;
    await Deadline.after(MACHINE_TEST_TIMEOUT / 2, "the doorbells").poll(given(QUEUES), 10);
    await exchange(frontend, SOME);
    const bases = await frontend.stop({ order: "new" });
    await frontend.resumeQueues(bases);
    await Deadline.after(MACHINE_TEST_TIMEOUT / 2, "the doorbells").poll(given(2 * QUEUES), 10);
    await exchange(frontend, SOME);
    // The relay would have left them where they are.
    const taken = () => frontend.queues.every(({ kick }) => unread(kick.number) === 0) || undefined;
    await Deadline.after(MACHINE_TEST_TIMEOUT / 4, "the daemon to take the kicks").poll(taken, 10);
  },
  MACHINE_TEST_TIMEOUT,
);

test(
  "while a front-end resets its function without an end, others are served, and the VF can be removed",
  async () => {
    await lab.add(lent);
    await lab.add(other);
    using busy = lab.dial(other);
    await run(busy, QUEUES);
    await exchange(busy, SOME);
    await using hostile = await FrontendProcess.start(lab.socket(lent), join(lab.directory, "hostile.log"), {
      queues: QUEUES,
      resets: true,
    });
    await hostile.resets(1);
    for (let round = 0; round < 5; round++) {
      await Promise.all([lab.call("vf.list"), lab.info(lent), exchange(busy, SOME)]);
    }
    // Still at it.
    await hostile.resets(1);
    await lab.remove(lent);
    await hostile.resets(2);
    await exchange(busy, SOME);
    expect((await rejection(lab.add(lent))).message).toContain(`${hostile.pid}`);
    await hostile.resets(1);
    await exchange(busy, SOME);

    await hostile.kill();
    await lab.add(lent);
    using frontend = lab.dial(lent);
    await run(frontend, QUEUES);
    await exchange(frontend, SOME);
    await exchange(busy, SOME);
  },
  MACHINE_TEST_TIMEOUT,
);
