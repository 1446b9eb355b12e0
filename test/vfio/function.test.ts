import { afterAll, afterEach, beforeAll, beforeEach, expect, test } from "bun:test";
import { readFileSync } from "node:fs";
import { Deadline } from "../../src/base/deadline.ts";
import { liveFds } from "../../src/native/fd.ts";
import { Mapping } from "../../src/native/mmio.ts";
import { eventfd, signalEventfd } from "../../src/native/sys.ts";
import { Status } from "../../src/virtio/features.ts";
import { PciCommand, PciConfig, VIRTIO_VENDOR } from "../../src/virtio/registers.ts";
import { FunctionDriver } from "../kit/machine/function-driver.ts";
import { Machine } from "../kit/machine/inside.ts";
import type { KernelLog } from "../kit/machine/kernel-log.ts";
import { rejection } from "../kit/rejection.ts";
import { VerifiedDisk } from "../kit/verified-disk.ts";
import { eventually, openFds, warmUp } from "../unit/native/open-fds.ts";

/** One function through the kernel's VFIO, without a daemon. */

const TIMEOUT = 60_000;
const machine = Machine.here();
const soon = () => Deadline.after(TIMEOUT / 2, "the test");
const bound = new DisposableStack();
let log: KernelLog;
let fds = 0;

beforeAll(() => {
  log = bound.use(machine.kernelLog());
  for (const one of machine.functions("blk")) bound.use(one.bind());
}, TIMEOUT);
afterAll(() => {
  bound.dispose();
}, TIMEOUT);
beforeEach(() => {
  warmUp();
  fds = openFds();
});
afterEach(async () => {
  // What an address space gives back goes on behind its disposal, as do closes of the system calls' threads.
  expect(await eventually(() => liveFds() === 0 && openFds() === fds)).toBe(true);
  expect(readFileSync("/proc/self/maps", "utf8")).not.toContain("vfio");
  expect(log.dmaFaults()).toEqual([]);
});

function open(id: string): Promise<FunctionDriver> {
  return FunctionDriver.open(machine.function(id).address);
}

/** Verified requests, one after the other. */
async function exchange(driver: FunctionDriver, queue: number, count = 20): Promise<void> {
  await new VerifiedDisk(queue * 256).steps(driver.queues[queue]!, count);
}

test(
  "registers and configuration space are those of the function",
  async () => {
    await using driver = await open("blk1");
    const { fn, device } = driver;
    expect(await fn.config.read(PciConfig.vendor, 2)).toBe(VIRTIO_VENDOR);
    expect(fn.config.size).toBe(4096);
    const seen = await fn.config.readBytes(0, 4);
    expect([...seen]).toEqual([...readFileSync(`/sys/bus/pci/devices/${fn.address}/config`)].slice(0, 4));
    const { common } = device.layout;
    const bar = fn.region(common.bar);
    expect(bar.place.areas).toEqual([{ offset: 0, size: bar.size }]);
    // 64 MiB, as the configuration space of a block device says it: in sectors.
    const config = await device.readConfig(8);
    expect(new DataView(config.buffer).getBigUint64(0, true)).toBe(BigInt((64 << 20) / 512));
    expect(await device.status()).toBe(0);
    await device.reset(soon());
    await device.negotiate(((await device.features()) & (1n << 32n)) | (1n << 33n));
    expect(await device.status()).toBe(Status.acknowledge | Status.driver | Status.featuresOk);
    expect(fn.interrupts.count).toBe(3);
    expect((await rejection(bar.read(bar.size, 1))).message).toContain(`which has ${bar.size}`);
  },
  TIMEOUT,
);

test(
  "a vector is routed anew again and again while another fires",
  async () => {
    await using driver = await open("blk1");
    await driver.start(2);
    let done = false;
    const busy = (async () => {
      const disk = new VerifiedDisk(0);
      while (!done) await disk.step(driver.queues[0]!);
      return disk.verified;
    })();
    using other = eventfd();
    const second = driver.queues[1]!;
    for (let round = 0; round < 50; round++) {
      await driver.fn.interrupts.route(2, round % 3 === 2 ? null : other.number);
    }
    const routed = driver.fn.interrupts.route(2, second.call.number);
    await routed;
    await exchange(driver, 1);
    done = true;
    expect(await busy).toBeGreaterThan(0);
    expect((await rejection(driver.fn.interrupts.route(3, null))).message).toContain("has no vector 3");
  },
  TIMEOUT,
);

test(
  "while it is reset the program goes on, and its registers are read afterwards",
  async () => {
    await using driver = await open("blk1");
    await driver.start(1);
    await exchange(driver, 0);
    let turns = 0;
    const counting = setInterval(() => turns++, 1);
    let ended = false;
    const resetting = driver.fn.reset(soon()).then(() => {
      ended = true;
    });
    await Bun.sleep(1);
    const before = turns;
    const status = await driver.device.status();
    const meanwhile = turns - before;
    clearInterval(counting);
    await resetting;
    expect(ended).toBe(true);
    expect(status).toBe(0);
    // An access that had waited inside the kernel would have let none pass.
    expect(meanwhile).toBeGreaterThan(3);
    // The vectors are as they were before.
    await driver.start(1);
    await exchange(driver, 0);
  },
  TIMEOUT,
);

test(
  "kicks ring the doorbell through the relay",
  async () => {
    await using driver = await open("blk2");
    using kick = eventfd();
    await driver.start(1, () => signalEventfd(kick.number));
    {
      using _connected = driver.doorbell(0).connect(kick.number, 0);
      await exchange(driver, 0);
      // Cut by a reset.
      await driver.fn.reset(soon());
    }
    await driver.start(1, () => signalEventfd(kick.number));
    using _connected = driver.doorbell(0).connect(kick.number, 0);
    await exchange(driver, 0);
  },
  TIMEOUT,
);

test(
  "the page of a doorbell is mapped and rung by whoever has the fd",
  async () => {
    await using driver = await open("blk2");
    const pages: Mapping[] = [];
    await driver.start(4, (queue) => pages[queue]!.write16(0, queue));
    for (const queue of [0, 1, 2, 3]) {
      const page = driver.doorbell(queue).share()!;
      expect(page.size).toBe(4096);
      pages.push(Mapping.map(page.fd, page.offset, page.size, "read-write"));
      await exchange(driver, queue, 5);
    }
    // Distinct: one page for each queue.
    expect(new Set([0, 1, 2, 3].map((queue) => driver.doorbell(queue).share()!.offset)).size).toBe(4);
    // The mapping outlives a reset.
    await driver.fn.reset(soon());
    await driver.start(1, (queue) => pages[queue]!.write16(0, queue));
    await exchange(driver, 0, 5);
    for (const page of pages) page[Symbol.dispose]();
  },
  TIMEOUT,
);

test(
  "registers that are switched off are an error",
  async () => {
    await using driver = await open("blk0");
    const { fn } = driver;
    const command = await fn.config.read(PciConfig.command, 2);
    await fn.config.write(PciConfig.command, 2, command & ~PciCommand.memory);
    const error = await rejection(driver.device.status());
    expect(error.message).toContain("cannot read 1 bytes at 0x14 of BAR 4");
    await fn.config.write(PciConfig.command, 2, command);
    expect(await driver.device.status()).toBe(0);
  },
  TIMEOUT,
);

test(
  "an error that the device reports is told",
  async () => {
    await using driver = await open("blk0");
    await machine.injectError(machine.function("blk0"), "COMP_ABORT");
    const reason = await soon().race(driver.fn.lost);
    expect(reason.message).toContain("AER");
  },
  TIMEOUT,
);

test(
  "a function that is to be unplugged is told, and given back by closing it",
  async () => {
    const blk = machine.function("blk0");
    const unplugging = await (async () => {
      await using driver = await FunctionDriver.open(blk.address);
      const unplugged = machine.unplug(blk);
      const reason = await soon().race(driver.fn.lost);
      expect(reason.message).toContain("wanted back by the kernel");
      return { unplugged };
    })();
    await unplugging.unplugged;
    // QEMU lets go of the disk a moment after it has let go of the function.
    const again = await soon().poll(() => machine.plug(blk).catch(() => undefined), 100);
    bound.use(again.bind());
    await using driver = await open("blk0");
    await driver.start(1);
    await exchange(driver, 0);
  },
  TIMEOUT,
);

test(
  "whenever the deadline passes while it is opened, nothing stays open",
  async () => {
    const { address } = machine.function("blk1");
    for (const milliseconds of [1, 60, 120, 180]) {
      const opened = await FunctionDriver.open(address, milliseconds).catch(() => undefined);
      await opened?.[Symbol.asyncDispose]();
    }
    await using driver = await open("blk1");
    await driver.start(1);
    await exchange(driver, 0);
  },
  TIMEOUT,
);
