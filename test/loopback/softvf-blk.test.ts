import { expect, test } from "bun:test";
import { readFile } from "node:fs/promises";
import { FeatureBit, featureBits } from "../../src/virtio/features.ts";
import { DescriptorFlag } from "../../src/virtio/split-ring.ts";
import {
  BlkStatus,
  discardRequest,
  flushRequest,
  getIdRequest,
  header,
  readRequest,
  SECTOR,
  writeRequest,
  writeZeroesRequest,
} from "../kit/blk-requests.ts";
import { pattern, TestDriver, TestVfs, USUAL_FEATURES } from "./softvf-driver.ts";

const withoutRingFeatures = USUAL_FEATURES & ~featureBits(FeatureBit.ringEventIdx, FeatureBit.ringIndirectDesc);
const withoutEventIdx = USUAL_FEATURES & ~featureBits(FeatureBit.ringEventIdx);
const { ok, ioError, unsupported } = BlkStatus;

for (const [name, features] of [
  ["indirect and EVENT_IDX", USUAL_FEATURES],
  ["indirect", withoutEventIdx],
  ["plain rings", withoutRingFeatures],
] as const) {
  test(`every request type does what the file shows: ${name}`, async () => {
    await using vfs = await TestVfs.serve(1);
    await using driver = await TestDriver.start(vfs.vf(0), 1, features);
    const data = pattern(8 * SECTOR, 1);

    const written = await driver.request(writeRequest(16, data.subarray(0, 1000), data.subarray(1000)));
    expect(written).toMatchObject({ status: ok, length: 1 });
    expect((await readFile(vfs.disk(0))).subarray(16 * SECTOR, 24 * SECTOR).equals(data)).toBe(true);

    const read = await driver.request(readRequest(16, 100, 8 * SECTOR - 100));
    expect(read).toMatchObject({ status: ok, length: data.length + 1 });
    expect(read.data).toEqual(data);

    expect(await driver.request(flushRequest())).toMatchObject({ status: ok });
    const id = await driver.request(getIdRequest());
    expect(new TextDecoder().decode(id.data)).toBe("vfe-softvf-0\0\0\0\0\0\0\0\0");

    expect(await driver.request(discardRequest({ sector: 16, sectors: 1 }))).toMatchObject({ status: ok });
    const zeroed = await driver.request(
      writeZeroesRequest({ sector: 18, sectors: 1 }, { sector: 20, sectors: 1, unmap: true }),
    );
    expect(zeroed).toMatchObject({ status: ok });
    const expected = data.slice();
    for (const sector of [0, 2, 4]) expected.fill(0, sector * SECTOR, (sector + 1) * SECTOR);
    expect((await readFile(vfs.disk(0))).subarray(16 * SECTOR, 24 * SECTOR).equals(expected)).toBe(true);
    expect(vfs.vf(0).fn.stats()[0]).toEqual({ received: 6, completed: 6, bad: 0, bytes: 19 * SECTOR });
  });
}

test("requests that cannot be done get the status of the specification", async () => {
  await using vfs = await TestVfs.serve(1);
  await using driver = await TestDriver.start(vfs.vf(0));
  const end = (8 << 20) / SECTOR;
  const cases = [
    [readRequest(end, SECTOR), ioError],
    [readRequest(end - 1, 2 * SECTOR), ioError],
    [readRequest(Number.MAX_SAFE_INTEGER, SECTOR), ioError],
    [readRequest(0, 100), ioError],
    [writeRequest(end, pattern(SECTOR, 1)), ioError],
    [writeRequest(0, pattern(SECTOR - 1, 1)), ioError],
    [discardRequest({ sector: 0, sectors: 1, unmap: true }), unsupported],
    [discardRequest({ sector: end, sectors: 1 }), ioError],
    [writeZeroesRequest({ sector: 0, sectors: 100_000 }), ioError],
    [{ readable: [header(99)], writable: [1] }, unsupported],
    [{ readable: [header(0).subarray(0, 8)], writable: [SECTOR, 1] }, ioError],
    [{ readable: [], writable: [SECTOR, 1] }, ioError],
    [readRequest(0), ok],
  ] as const;
  for (const [request, status] of cases) expect(await driver.request(request)).toMatchObject({ status });
  expect(await driver.request(readRequest(0, SECTOR))).toMatchObject({ status: ok, length: SECTOR + 1 });
});

test("a read-only disk refuses every change", async () => {
  await using vfs = await TestVfs.serve(1, { readOnly: true });
  await using driver = await TestDriver.start(vfs.vf(0), 1, USUAL_FEATURES | (1n << 5n));
  for (const request of [
    writeRequest(0, pattern(SECTOR, 1)),
    discardRequest({ sector: 0, sectors: 1 }),
    writeZeroesRequest({ sector: 0, sectors: 1 }),
  ]) {
    expect(await driver.request(request)).toMatchObject({ status: ioError });
  }
  expect(await driver.request(readRequest(0, SECTOR))).toMatchObject({ status: ok });
  expect((await readFile(vfs.disk(0))).equals(new Uint8Array(8 << 20))).toBe(true);
});

test("four queues at depth, verified against the file", async () => {
  await using vfs = await TestVfs.serve(1);
  await using driver = await TestDriver.start(vfs.vf(0), 4);
  const length = 8 * SECTOR;
  const place = (queue: number, slot: number) => (queue * 64 + slot) * 8;
  for (let round = 0; round < 3; round++) {
    const all = [0, 1, 2, 3].flatMap((queue) =>
      Array.from({ length: 64 }, (_, slot) =>
        driver.request(writeRequest(place(queue, slot), pattern(length, round + queue * 64 + slot)), queue),
      ),
    );
    for (const { status } of await Promise.all(all)) expect(status).toBe(ok);
    const file = await readFile(vfs.disk(0));
    for (let index = 0; index < 256; index++) {
      const seen = file.subarray(index * length, (index + 1) * length);
      expect(seen.equals(pattern(length, round + index))).toBe(true);
    }
  }
});

test("a resize truncates the file, interrupts and changes the bounds", async () => {
  await using vfs = await TestVfs.serve(1);
  await using driver = await TestDriver.start(vfs.vf(0));
  const beyond = (8 << 20) / SECTOR;
  expect(await driver.request(readRequest(beyond, SECTOR))).toMatchObject({ status: ioError });
  const interrupt = driver.configInterrupt();
  await vfs.vf(0).fn.set("size", 16 << 20);
  await interrupt;
  const config = await driver.device.readConfig(8);
  expect(new DataView(config.slice().buffer).getBigUint64(0, true)).toBe(BigInt((16 << 20) / SECTOR));
  expect(await driver.request(readRequest(beyond, SECTOR))).toMatchObject({ status: ok });
  expect(Bun.file(vfs.disk(0)).size).toBe(16 << 20);
});

test("a disk that is made shorter ends where the file ends", async () => {
  await using vfs = await TestVfs.serve(1);
  await using driver = await TestDriver.start(vfs.vf(0));
  const last = (4 << 20) / SECTOR - 1;
  await vfs.vf(0).fn.set("size", 4 << 20);
  expect(Bun.file(vfs.disk(0)).size).toBe(4 << 20);
  expect(await driver.request(writeRequest(last, pattern(SECTOR, 1)))).toMatchObject({ status: ok });
  expect(await driver.request(writeRequest(last, pattern(2 * SECTOR, 1)))).toMatchObject({ status: ioError });
  expect(Bun.file(vfs.disk(0)).size).toBe(4 << 20);
});

for (const ringSize of [64, 1024, 4096]) {
  test(`as many buffers as the device says fit into a request: rings up to ${ringSize}`, async () => {
    await using vfs = await TestVfs.serve(1, { ringSize });
    // The driver's ring has 64 entries.
    await using driver = await TestDriver.start(vfs.vf(0));
    const config = await driver.device.readConfig(16);
    const segments = new DataView(config.slice().buffer).getUint32(12, true);
    expect(segments).toBeGreaterThanOrEqual(Math.min(ringSize, 1024) - 2);
    const request = readRequest(0, ...Array.from({ length: segments }, () => SECTOR));
    expect(await driver.request(request)).toMatchObject({ status: ok, length: segments * SECTOR + 1 });
  });
}

test("a queue that is never empty does not keep the others from being served", async () => {
  await using vfs = await TestVfs.serve(1);
  await using driver = await TestDriver.start(vfs.vf(0), 2);
  const busy = driver.queues[0]!;
  const { ring } = busy;
  const [headerAt, dataAt, statusAt] = [ring.arena.take(16), ring.arena.take(512 << 10), ring.arena.take(1)];
  driver.memory.write(headerAt, header(0));
  const { next, write, indirect } = DescriptorFlag;
  // The same memory many times: a request takes a millisecond or more, and 32 of them are always waiting.
  const data = Array.from({ length: 15 }, () => ({ address: dataAt, length: 512 << 10, flags: next | write }));
  const chain = [
    { address: headerAt, length: 16, flags: next },
    ...data,
    { address: statusAt, length: 1, flags: write },
  ];
  const length = 16 * chain.length;
  const table = ring.arena.take(length);
  for (const [index, entry] of chain.entries()) ring.writeDescriptor(index, { ...entry, next: index + 1 }, table);
  let going = true;
  const load = Array.from({ length: 32 }, async () => {
    while (going) await busy.requestRaw([{ address: table, length, flags: indirect }]);
  });
  for (let round = 0; round < 5; round++) {
    expect(await driver.request(readRequest(0, SECTOR), 1)).toMatchObject({ status: ok });
  }
  going = false;
  await Promise.all(load);
});

test("slow requests are in flight together, shuffled ones complete in another order", async () => {
  await using vfs = await TestVfs.serve(1, { slow: 40, outOfOrder: true });
  await using driver = await TestDriver.start(vfs.vf(0));
  const order: number[] = [];
  const begun = performance.now();
  await Promise.all(
    Array.from({ length: 48 }, async (_, index) => {
      expect(await driver.request(readRequest(index, SECTOR))).toMatchObject({ status: ok });
      order.push(index);
    }),
  );
  expect(performance.now() - begun).toBeGreaterThanOrEqual(40);
  expect(order).not.toEqual(order.toSorted((a, b) => a - b));
});

test("delayed requests are served when the delay is taken away", async () => {
  await using vfs = await TestVfs.serve(1, { slow: 3_600_000 });
  await using driver = await TestDriver.start(vfs.vf(0));
  const request = driver.request(readRequest(0, SECTOR));
  await Bun.sleep(20);
  await vfs.vf(0).fn.set("slow", 1);
  expect(await request).toMatchObject({ status: ok });
});

test("without a write cache a driver may switch it on, and it is off again after a reset", async () => {
  await using vfs = await TestVfs.serve(1, { writeback: false });
  await using driver = await TestDriver.start(vfs.vf(0));
  expect((await driver.device.readConfig(33))[32]).toBe(0);
  await driver.device.writeConfig(32, Uint8Array.of(1));
  expect((await driver.device.readConfig(33))[32]).toBe(1);
  expect(await driver.request(writeRequest(0, pattern(SECTOR, 3)))).toMatchObject({ status: ok });
  await vfs.vf(0).fn.reset();
  expect((await driver.device.readConfig(33))[32]).toBe(0);
});
