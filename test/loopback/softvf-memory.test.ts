import { expect, test } from "bun:test";
import { readdirSync, truncateSync } from "node:fs";
import { Deadline } from "../../src/base/deadline.ts";
import { liveFds } from "../../src/native/fd.ts";
import { MessageSocket } from "../../src/native/message-socket.ts";
import { connectUnix, eventfd, fileInfo, memfd, openFile } from "../../src/native/sys.ts";
import { VfioUserFunction } from "../../src/pci/vfio-user/function.ts";
import { encodeMessage, vfioUserFraming } from "../../src/vfio-user/framing.ts";
import { Command } from "../../src/vfio-user/messages.ts";
import { Status } from "../../src/virtio/features.ts";
import { DescriptorFlag } from "../../src/virtio/split-ring.ts";
import { BlkStatus, BlkType, header, readRequest, SECTOR, writeRequest } from "../kit/blk-requests.ts";
import { GuestMemoryFile } from "../kit/guest-memory-file.ts";
import { rejection } from "../kit/rejection.ts";
import { GUEST_BASE, pattern, TestDriver, TestVfs } from "./softvf-driver.ts";

const EXTRA = GUEST_BASE + (1 << 30);

test("buffers may lie across mappings that touch", async () => {
  await using vfs = await TestVfs.serve(1);
  await using driver = await TestDriver.start(vfs.vf(0));
  using extra = new GuestMemoryFile(EXTRA, 8192);
  // Adjacent addresses, swapped pages of the file.
  await driver.map(extra, EXTRA, 4096, 4096);
  await driver.map(extra, EXTRA + 4096, 4096, 0);
  const data = pattern(8 * SECTOR, 5);
  expect(await driver.request(writeRequest(0, data))).toMatchObject({ status: BlkStatus.ok });
  const { ring } = driver.queues[0]!;
  const headerAt = ring.arena.take(16);
  const statusAt = ring.arena.take(1);
  driver.memory.write(headerAt, header(BlkType.in));
  const { write } = DescriptorFlag;
  await driver.queues[0]!.requestRaw([
    { address: headerAt, length: 16, flags: 0 },
    { address: EXTRA + 2048, length: 4096, flags: write },
    { address: statusAt, length: 1, flags: write },
  ]);
  expect(driver.memory.read(statusAt, 1)[0]).toBe(BlkStatus.ok);
  // The first half lies in the mapping of the file's second page.
  const file = (offset: number) => extra.read(EXTRA + offset, 2048);
  expect(file(4096 + 2048).join()).toBe(data.subarray(0, 2048).join());
  expect(file(0).join()).toBe(data.subarray(2048, 4096).join());
});

test("maps that overlap, are no memory or no pages are refused; the connection goes on", async () => {
  await using vfs = await TestVfs.serve(1);
  await using driver = await TestDriver.start(vfs.vf(0));
  const { memory } = driver;
  expect((await rejection(driver.map(memory, GUEST_BASE + 4096, 4096))).message).toContain("EEXIST");
  expect((await rejection(driver.map(memory, GUEST_BASE - 4096, 8192))).message).toContain("EEXIST");
  expect((await rejection(driver.map(memory, EXTRA, memory.size, 4096))).message).toContain("EINVAL");
  expect((await rejection(driver.map(memory, EXTRA, 100))).message).toContain("EINVAL");
  const range = { iova: EXTRA, size: 4096, offset: 0, file: { dev: 0, ino: 0 } };
  using event = eventfd();
  using device = openFile("/dev/zero", "read-write");
  for (const fd of [event, device]) {
    expect((await rejection(driver.fn.dmaMap(range, fd.number, Deadline.after(1000, "map")))).message).toContain(
      "EINVAL",
    );
  }
  expect((await rejection(driver.unmap(GUEST_BASE, 4096))).message).toContain("ENOENT");
  expect((await rejection(driver.fn.interrupts.route(1, memory.file.number))).message).toContain("EINVAL");
  expect(await driver.request(readRequest(0, SECTOR))).toMatchObject({ status: BlkStatus.ok });
});

test("unmapping under load fails requests, and the ring's own range the function", async () => {
  await using vfs = await TestVfs.serve(1);
  await using driver = await TestDriver.start(vfs.vf(0), 4);
  let going = true;
  const load = Promise.all(
    driver.queues.map(async (_, queue) => {
      while (going) await driver.request(readRequest(0, 64 << 10), queue);
    }),
  );
  using extra = new GuestMemoryFile(EXTRA, 1 << 20);
  for (let round = 0; round < 50; round++) {
    await driver.map(extra);
    await driver.unmap(EXTRA, 1 << 20);
  }
  going = false;
  await load;
  const interrupt = driver.configInterrupt();
  await driver.unmap(GUEST_BASE, driver.memory.size);
  await interrupt;
  expect((await driver.device.status()) & Status.needsReset).toBe(Status.needsReset);
});

test("memory that is cut under load, clients that vanish: nothing is left, the next client is served", async () => {
  await using vfs = await TestVfs.serve(2);
  await using neighbour = await TestDriver.start(vfs.vf(1));
  const settle = async () => {
    await Deadline.after(5000, "the end of the client").poll(() => !vfs.vf(0).server.busy || undefined, 1);
    return { fds: readdirSync("/proc/self/fd").length, tasks: readdirSync("/proc/self/task").length, owned: liveFds() };
  };
  const round = async (cut: boolean) => {
    await using driver = await TestDriver.start(vfs.vf(0), 4);
    const load = driver.queues.flatMap(({ ring }, queue) =>
      Array.from({ length: 16 }, () => driver.request(readRequest(0, 16 << 10), queue).catch(() => ring.pending)),
    );
    if (cut) truncateSync(`/proc/self/fd/${driver.memory.file.number}`, 4096);
    driver.fn.hangUp(new Error("gone"));
    void Promise.allSettled(load);
  };
  await round(false);
  const before = await settle();
  for (let count = 0; count < 10; count++) await round(count % 2 === 0);
  // What came from a client is closed behind the scenes.
  const after = await Deadline.after(5000, "fewer file descriptors").poll(async () => {
    const now = await settle();
    return now.fds <= before.fds ? now : undefined;
  }, 5);
  expect(after.owned).toBe(before.owned);
  expect(after.tasks).toBeLessThanOrEqual(before.tasks);
  expect(await neighbour.request(readRequest(0, SECTOR))).toMatchObject({ status: BlkStatus.ok });
});

test("a client gets a part of the address space, not all of it", async () => {
  await using vfs = await TestVfs.serve(1);
  await using driver = await TestDriver.start(vfs.vf(0));
  using huge = memfd("huge", 4 * 2 ** 40);
  const map = (iova: number, size: number) =>
    driver.fn.dmaMap({ iova, size, offset: 0, file: fileInfo(huge.number) }, huge.number, Deadline.after(5000, "map"));
  expect((await rejection(map(2 ** 44, 4 * 2 ** 40))).message).toContain("ENOSPC");
  expect(vfs.warnings.at(-1)).toContain("dmaMap refused");
  for (let round = 0; round < 3; round++) {
    await map(2 ** 44, 3 * 2 ** 40);
    expect((await rejection(map(2 ** 43, 2 ** 40))).message).toContain("ENOSPC");
    await driver.unmap(2 ** 44, 3 * 2 ** 40);
  }
  expect(await driver.request(readRequest(0, SECTOR))).toMatchObject({ status: BlkStatus.ok });
});

test("clients that say nothing take neither the function nor the process", async () => {
  await using vfs = await TestVfs.serve(1);
  const { server } = vfs.vf(0);
  await using driver = await TestDriver.start(vfs.vf(0));
  const framing = vfioUserFraming({ maxBody: 4096, maxFds: 1 });
  using silent = new DisposableStack();
  const sockets = Array.from({ length: 40 }, () => silent.use(new MessageSocket(connectUnix(server.path), framing)));
  const order: number[] = [];
  const ends = sockets.map(async (socket, index) => {
    expect(await socket.receive()).toBeUndefined();
    order.push(index);
  });
  await Deadline.after(5000, "hang-ups").race(Promise.all(ends));
  // The first eight may wait; who comes then is hung up on at once.
  expect(order.slice(-8).sort()).toEqual([0, 1, 2, 3, 4, 5, 6, 7]);
  expect(await driver.request(readRequest(0, SECTOR))).toMatchObject({ status: BlkStatus.ok });
});

test("a second client is answered EBUSY; one that comes when the first goes is served", async () => {
  await using vfs = await TestVfs.serve(1);
  const { address, server } = vfs.vf(0);
  {
    await using first = await TestDriver.start(vfs.vf(0));
    const second = VfioUserFunction.connect(address, server.path, Deadline.after(5000, "connect"));
    expect((await rejection(second)).message).toContain("EBUSY");
    expect(await first.request(readRequest(0, SECTOR))).toMatchObject({ status: BlkStatus.ok });
  }
  await using next = await TestDriver.start(vfs.vf(0));
  expect(await next.request(readRequest(0, SECTOR))).toMatchObject({ status: BlkStatus.ok });
});

test("a client that talks nonsense is hung up on", async () => {
  await using vfs = await TestVfs.serve(1);
  const { server } = vfs.vf(0);
  const deep = `{"capabilities":{"max_msg_fds":${"[".repeat(400_000)}${"]".repeat(400_000)}}}`;
  const version = { id: 0, command: Command.version, flags: 0 };
  for (const bytes of [
    new Uint8Array(16),
    Uint8Array.of(0, 0, 4, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0),
    encodeMessage(version, Buffer.from(`\0\0\x01\0${deep}`)),
  ]) {
    using socket = new MessageSocket(connectUnix(server.path), vfioUserFraming({ maxBody: 4096, maxFds: 1 }));
    await socket.send(bytes);
    expect(await socket.receive()).toBeUndefined();
  }
  await using driver = await TestDriver.start(vfs.vf(0));
  expect(await driver.request(readRequest(0, SECTOR))).toMatchObject({ status: BlkStatus.ok });
});
