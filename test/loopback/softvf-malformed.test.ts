import { expect, test } from "bun:test";
import { truncateSync } from "node:fs";
import { Deadline } from "../../src/base/deadline.ts";
import { Status } from "../../src/virtio/features.ts";
import { DescriptorFlag } from "../../src/virtio/split-ring.ts";
import { BlkStatus, readRequest, SECTOR, writeRequest } from "../kit/blk-requests.ts";
import type { DriverRing } from "../kit/driver-ring.ts";
import { rejection } from "../kit/rejection.ts";
import { GUEST_BASE, pattern, TestDriver, TestVfs } from "./softvf-driver.ts";

const { next, write, indirect } = DescriptorFlag;
const UNMAPPED = 0x7000_0000;

/** Verified I/O on a VF until the returned function is called. */
function keepBusy(driver: TestDriver): () => Promise<number> {
  let going = true;
  const done = (async () => {
    let rounds = 0;
    for (; going; rounds++) {
      const data = pattern(4 * SECTOR, rounds);
      expect(await driver.request(writeRequest(8, data))).toMatchObject({ status: BlkStatus.ok });
      expect((await driver.request(readRequest(8, data.length))).data).toEqual(data);
    }
    return rounds;
  })();
  return () => {
    going = false;
    return done;
  };
}

/** Each breaks the ring; the device says NEEDS_RESET by a configuration interrupt. */
const BROKEN_RINGS: Readonly<Record<string, (ring: DriverRing, driver: TestDriver) => void>> = {
  "a chain that loops": (ring) => {
    ring.writeDescriptor(0, { address: ring.arena.start, length: 16, flags: next, next: 1 });
    ring.writeDescriptor(1, { address: ring.arena.start, length: 16, flags: next, next: 0 });
    ring.makeAvailable(0);
  },
  "a link out of the table": (ring) => {
    ring.writeDescriptor(0, { address: ring.arena.start, length: 16, flags: next, next: 64 });
    ring.makeAvailable(0);
  },
  "a head out of the table": (ring) => ring.makeAvailable(64),
  "an available index that jumps": (ring) => ring.setAvailableIndex(65),
  "an indirect table in an indirect table": (ring) => {
    const table = ring.arena.take(32);
    ring.writeDescriptor(0, { address: table, length: 16, flags: indirect, next: 0 }, table);
    ring.writeDescriptor(0, { address: table, length: 16, flags: indirect, next: 0 });
    ring.makeAvailable(0);
  },
  "an indirect table that loops": (ring) => {
    const table = ring.arena.take(32);
    ring.writeDescriptor(0, { address: table, length: 16, flags: next, next: 0 }, table);
    ring.writeDescriptor(0, { address: table, length: 32, flags: indirect, next: 0 });
    ring.makeAvailable(0);
  },
  "an indirect table of no whole entries": (ring) => {
    ring.writeDescriptor(0, { address: ring.arena.start, length: 17, flags: indirect, next: 0 });
    ring.makeAvailable(0);
  },
  "an indirect table of no entries": (ring) => {
    ring.writeDescriptor(0, { address: ring.arena.start, length: 0, flags: indirect, next: 0 });
    ring.makeAvailable(0);
  },
  "an indirect table in unmapped memory": (ring) => {
    ring.writeDescriptor(0, { address: UNMAPPED, length: 32, flags: indirect, next: 0 });
    ring.makeAvailable(0);
  },
  "a chain that goes on behind its indirect table": (ring) => {
    ring.writeDescriptor(0, { address: ring.arena.start, length: 16, flags: indirect | next, next: 1 });
    ring.makeAvailable(0);
  },
  "a chain that is in flight already": (ring, driver) => {
    driver.memory.write(ring.arena.start, new Uint8Array(16));
    ring.writeDescriptor(0, { address: ring.arena.start, length: 16, flags: next, next: 1 });
    ring.writeDescriptor(1, { address: ring.arena.start + 16, length: 1, flags: write, next: 0 });
    ring.makeAvailable(0);
    ring.makeAvailable(0);
  },
  "a request without a status byte": (ring) => {
    ring.writeDescriptor(0, { address: ring.arena.start, length: 16, flags: 0, next: 0 });
    ring.makeAvailable(0);
  },
  "a request of empty buffers": (ring) => {
    ring.writeDescriptor(0, { address: ring.arena.start, length: 0, flags: write, next: 0 });
    ring.makeAvailable(0);
  },
  "a status byte in unmapped memory": (ring) => {
    ring.writeDescriptor(0, { address: ring.arena.start, length: 16, flags: next, next: 1 });
    ring.writeDescriptor(1, { address: UNMAPPED, length: 1, flags: write, next: 0 });
    ring.makeAvailable(0);
  },
  "a memory file that was cut to nothing": (_, { memory }) => truncateSync(`/proc/self/fd/${memory.file.number}`, 0),
};

/** What the log says of each. */
const REASONS: Readonly<Record<string, string>> = {
  "a chain that loops": "chain 0 loops",
  "a link out of the table": "chain 0 links to descriptor 64 of 64",
  "a head out of the table": "available head 64 is outside the ring of 64",
  "an available index that jumps": "available index 65 is 65 ahead of 0, the ring has 64",
  "an indirect table in an indirect table": "chain 0 has an indirect table inside an indirect table",
  "an indirect table that loops": "indirect table of chain 0 loops",
  "an indirect table of no whole entries": "indirect table of chain 0 has 17 bytes",
  "an indirect table of no entries": "indirect table of chain 0 has 0 bytes",
  "an indirect table in unmapped memory": "indirect table of chain 0 at 0x70000000 is not mapped",
  "a chain that goes on behind its indirect table": "chain 0 continues behind its indirect table",
  "a chain that is in flight already": "available head 0 has not been given back yet",
  "a request without a status byte": "request 0 of queue 0 has no place for the status byte",
  "a request of empty buffers": "request 0 of queue 0 has no place for the status byte",
  "a status byte in unmapped memory": "status byte of request 0 of queue 0 is not in mapped memory",
  "a memory file that was cut to nothing": "is gone",
};

test("broken rings end the service of their VF, with another VF at work", async () => {
  await using vfs = await TestVfs.serve(2);
  await using neighbour = await TestDriver.start(vfs.vf(1));
  const stop = keepBusy(neighbour);
  for (const [name, breakRing] of Object.entries(BROKEN_RINGS)) {
    await vfs.vf(0).fn.set("slow", name.includes("in flight") ? 20 : 0);
    await using driver = await TestDriver.start(vfs.vf(0));
    const interrupt = driver.configInterrupt();
    breakRing(driver.queues[0]!.ring, driver);
    await driver.fn.doorbell(4, 0x3000).ring(0);
    await interrupt.catch((cause) => {
      throw new Error(name, { cause });
    });
    expect((await driver.device.status()) & Status.needsReset).toBe(Status.needsReset);
    expect(vfs.warnings.at(-1)).toContain(REASONS[name]!);
  }
  expect(await stop()).toBeGreaterThan(0);
  await vfs.vf(0).fn.set("slow", 0);
  await using after = await TestDriver.start(vfs.vf(0));
  expect(await after.request(readRequest(0, SECTOR))).toMatchObject({ status: BlkStatus.ok });
});

test("malformed requests whose status byte can be reached fail alone", async () => {
  await using vfs = await TestVfs.serve(1);
  await using driver = await TestDriver.start(vfs.vf(0));
  const { ring } = driver.queues[0]!;
  const headerAt = ring.arena.take(16);
  const statusAt = ring.arena.take(1);
  driver.memory.write(headerAt, new Uint8Array(16));
  const cases = {
    "data in unmapped memory": [
      { address: headerAt, length: 16, flags: 0 },
      { address: UNMAPPED, length: SECTOR, flags: write },
      { address: statusAt, length: 1, flags: write },
    ],
    "a readable buffer behind a writable one": [
      { address: statusAt, length: 1, flags: write },
      { address: headerAt, length: 16, flags: 0 },
    ],
    "a header that is writable": [
      { address: headerAt, length: 16, flags: write },
      { address: statusAt, length: 1, flags: write },
    ],
    "data that ends outside the mapped range": [
      { address: headerAt, length: 16, flags: 0 },
      { address: GUEST_BASE + driver.memory.size - 256, length: SECTOR, flags: write },
      { address: statusAt, length: 1, flags: write },
    ],
    "an address that wraps around": [
      { address: headerAt, length: 16, flags: 0 },
      { address: -4096, length: 2 * 4096, flags: write },
      { address: statusAt, length: 1, flags: write },
    ],
  };
  for (const [name, chain] of Object.entries(cases)) {
    driver.memory.write(statusAt, Uint8Array.of(0xff));
    await Deadline.after(5000, name).race(driver.queues[0]!.requestRaw(chain));
    const status = driver.memory.read(statusAt, 1)[0];
    expect([name, status]).toEqual([name, BlkStatus.ioError]);
  }
  expect((await driver.device.status()) & Status.needsReset).toBe(0);
});

test("rings that cannot be used are refused when they are enabled", async () => {
  await using vfs = await TestVfs.serve(1);
  const good = {
    index: 0,
    size: 64,
    vector: 1,
    desc: GUEST_BASE,
    driver: GUEST_BASE + 4096,
    device: GUEST_BASE + 8192,
  };
  const cases = [
    { ...good, size: 48 },
    { ...good, size: 512 },
    { ...good, desc: GUEST_BASE + 8 },
    { ...good, device: GUEST_BASE + 8194 },
    { ...good, driver: UNMAPPED },
    { ...good, device: GUEST_BASE + (1 << 30) },
  ];
  for (const queue of cases) {
    await using driver = await TestDriver.connect(vfs.vf(0));
    expect(
      (await rejection(driver.device.setUpQueues(0, [{ ...queue, lastAvail: 0, lastUsed: 0 }]))).message,
    ).toContain("take queue 0");
    expect((await driver.device.status()) & Status.needsReset).toBe(Status.needsReset);
  }
  await using driver = await TestDriver.connect(vfs.vf(0));
  await driver.device.setUpQueues(0, [{ ...good, lastAvail: 0, lastUsed: 0 }]);
});

test("features that were not offered, or no VERSION_1, leave FEATURES_OK clear", async () => {
  await using vfs = await TestVfs.serve(1);
  await using driver = await TestDriver.connect(vfs.vf(0));
  const offered = await driver.device.features();
  for (const features of [offered | (1n << 40n), offered & ~(1n << 32n), offered | 1n]) {
    await driver.device.reset(Deadline.after(1000, "reset"));
    expect((await rejection(driver.device.negotiate(features))).message).toContain("does not accept");
  }
});

test("registers can be reached through the PCI configuration space", async () => {
  await using vfs = await TestVfs.serve(1);
  await using driver = await TestDriver.connect(vfs.vf(0));
  const { config } = driver.fn;
  let window = await config.read(0x34, 1);
  while ((await config.read(window + 3, 1)) !== 5) window = await config.read(window + 1, 1);
  const access = async (offset: number, length: number) => {
    await config.write(window + 8, 4, offset);
    await config.write(window + 12, 4, length);
    return await config.read(window + 16, 4);
  };
  const { acknowledge, driver: known, featuresOk } = Status;
  expect((await access(20, 1)) & 0xff).toBe(acknowledge | known | featuresOk);
  await config.write(window + 16, 4, 0);
  expect(await driver.device.status()).toBe(0);
  // Nothing is there, or it is no register: nothing happens.
  for (const [offset, length] of [
    [0xffff_fff0, 4],
    [2, 4],
    [0, 3],
    [0, 0],
  ] as const) {
    await access(offset, length);
    await config.write(window + 16, 4, 1);
  }
  expect(await driver.device.status()).toBe(0);
});
